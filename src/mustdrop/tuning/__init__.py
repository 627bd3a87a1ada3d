"""Pick a method and a budget for a model and a few samples of what it is asked. See docs/tune.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mustdrop.tuning.candidate import Candidate
    from mustdrop.tuning.goal import Goal
    from mustdrop.tuning.result import Tuning
    from mustdrop.tuning.search import KEEPS, tune

__all__ = ["KEEPS", "Candidate", "Goal", "Tuning", "tune"]

_HOMES = {"KEEPS": "search", "Candidate": "candidate", "Goal": "goal", "Tuning": "result", "tune": "search"}

if not TYPE_CHECKING:  # torch is imported when a name is asked for: the command line starts without it

    def __getattr__(name: str) -> Any:
        """A public name, imported now."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value
