"""Pick a method and a budget for a model and a few samples of what it is asked. See docs/tune.md."""

from mustdrop.tune.goal import Goal
from mustdrop.tune.result import Candidate, Tuning
from mustdrop.tune.search import KEEPS, tune

__all__ = ["KEEPS", "Candidate", "Goal", "Tuning", "tune"]
