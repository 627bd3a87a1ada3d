"""Pick a method and a budget for a model and a few samples of what it is asked. See docs/tune.md."""

from mustdrop.tuning.goal import Goal
from mustdrop.tuning.result import Candidate, Tuning
from mustdrop.tuning.search import KEEPS, tune

__all__ = ["KEEPS", "Candidate", "Goal", "Tuning", "tune"]
