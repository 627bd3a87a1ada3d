"""What became of the calls of one patched model: their traces, or why there is none, and which is asked for."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mustdrop.errors import NotPatchedError

if TYPE_CHECKING:
    from mustdrop.runtime.trace_builder import EndedCall
    from mustdrop.trace import Trace

_clock = itertools.count(1)  # of this process: traces of all models, in the order of things


def now() -> int:
    """The next moment."""
    return next(_clock)


@dataclass(frozen=True)
class Outcome:
    """How a call ended.

    Attributes:
        call: what it left; None if it failed.
        failure: what it raised, in one line; empty if it did not fail.
        began: when.
        ended: when.
    """

    call: EndedCall | None
    failure: str
    began: int
    ended: int


class _Own(threading.local):
    """The last outcome of one thread."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None


class Ledger:
    """The last outcome of each thread, and of all. Copies know the last of all."""

    def __init__(self) -> None:
        self.newest: Outcome | None = None
        self._own = _Own()

    def note(self, began: int, call: EndedCall | None = None, error: BaseException | None = None) -> None:
        """A call of this thread has ended, well or with an exception."""
        failure = "" if call is not None else _line(error)
        self.newest = self._own.outcome = Outcome(call, failure, began, now())

    def outcome(self) -> Outcome | None:
        """The last outcome of this thread, unless a call of another thread began and ended after it.

        Threads that run side by side see their own.
        """
        own, newest = self._own.outcome, self.newest
        if own is None or (newest is not None and newest.began > own.ended):
            return newest
        return own

    def trace(self) -> Trace:
        """The trace of that outcome. It is made now, if it has not been asked for before.

        Raises:
            NotPatchedError: no call has ended yet, or the last one failed.
        """
        found = self.outcome()
        if found is None:
            raise NotPatchedError("the patched model has not run yet: call model.generate(...) or model(...) first.")
        if found.call is None:
            raise NotPatchedError(
                f"the last call of this model failed and left no trace ({found.failure}): mend that and run it again."
            )
        return found.call.trace

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        copy = Ledger()
        copy.newest = self.newest
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"newest": self.newest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.newest = state["newest"]


def _line(error: BaseException | None) -> str:
    if error is None:
        return "for an unknown reason"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
