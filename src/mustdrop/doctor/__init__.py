"""What is installed, what will run here, and whether it computes what it should: `mustdrop doctor`."""

from mustdrop.doctor.installed import facts
from mustdrop.doctor.selftest import CHECKS, Outcome, self_test

__all__ = ["CHECKS", "Outcome", "facts", "self_test"]
