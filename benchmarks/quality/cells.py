"""What is measured: every registered method at every budget. No method is named here."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mustdrop
from mustdrop.errors import UnknownMethodError, did_you_mean
from mustdrop.method import registry

#: Shares of the vision tokens: 288, 192, 128, 64 and 32 of 576, the budgets of the papers' tables and half the last.
BUDGETS = (1 / 2, 1 / 3, 2 / 9, 1 / 9, 1 / 18)


@dataclass(frozen=True)
class Cell:
    """A method at a budget; `keep` is None for methods without a budget, such as the one that drops nothing."""

    method: str
    keep: float | None

    @property
    def key(self) -> tuple[str, float | None]:
        """What identifies the cell in a journal."""
        return self.method, None if self.keep is None else round(self.keep, 6)

    def knobs(self, seed: int) -> dict[str, Any]:
        """Settings for `patch`: the budget, and the seed where the method draws."""
        fields = registry()[self.method].model_fields
        return ({} if self.keep is None else {"keep": self.keep}) | ({"seed": seed} if "seed" in fields else {})

    def patched(self, model: Any, seed: int) -> AbstractContextManager[Any]:
        """The model with this method while the context lasts."""
        return mustdrop.patched(model, self.method, **self.knobs(seed))


def plan(methods: Sequence[str] | None, budgets: Sequence[float] | None) -> list[Cell]:
    """The cells, methods without a budget first."""
    names = methods or mustdrop.methods()
    for name in names:
        check(name)
    free = [name for name in names if "keep" not in registry()[name].model_fields]
    budgeted = [name for name in names if name not in free]
    found = [Cell(name, None) for name in free]
    return found + [Cell(name, keep) for name in budgeted for keep in budgets or BUDGETS]


def check(method: str) -> None:
    """Raise `UnknownMethodError` for a name that is not registered."""
    if method not in registry():
        raise UnknownMethodError(f"there is no method {method!r}. {did_you_mean(method, registry())}")
