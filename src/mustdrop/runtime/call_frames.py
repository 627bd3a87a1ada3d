"""Whether the call of a module still runs.

torch tells forward hooks of an `Exception`, and of an interrupt (`KeyboardInterrupt`, `SystemExit`) nobody. One in
another hook of the same module ends the call without a word; then its frame is no longer on the stack.
"""

from __future__ import annotations

import sys
from types import FrameType

_MODULE = "torch.nn.modules.module"  # where `Module.__call__` runs hooks and forward


def call_of_module() -> FrameType | None:
    """The frame of torch that runs the hook which asks; None where no hook does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != _MODULE:
        frame = frame.f_back
    return frame


def runs(wanted: FrameType) -> bool:
    """Whether a frame is on the stack of this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None
