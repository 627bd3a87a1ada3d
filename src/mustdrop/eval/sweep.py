"""Several methods at several budgets, one run each, with the model loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mustdrop.budget import Keep
from mustdrop.errors import MustDropError
from mustdrop.eval.result import EvalResult
from mustdrop.eval.settings import Settings

Load = Callable[[Settings], tuple[Any, Any]]
Evaluate = Callable[[Settings, tuple[Any, Any]], EvalResult | None]


@dataclass(frozen=True)
class Outcome:
    """One run of several.

    Attributes:
        settings: of the run.
        result: what it found; None in all processes but the first, and where it was refused.
        refused: why the method cannot do it; None where it could.
    """

    settings: Settings
    result: EvalResult | None
    refused: MustDropError | None = None


def runs(settings: Settings, methods: Sequence[str], budgets: Sequence[Keep]) -> list[Settings]:
    """The runs that a command line names: each method at each budget, and once where it has no budget.

    Args:
        settings: of all runs; with a folder, each run gets one of its own in there.
        methods: names.
        budgets: none for each method's own.

    Raises:
        UnknownMethodError, UnknownKnobError, BudgetError, ConfigError: a method or a setting that there is not. It
            shows here, before any run.
    """
    from mustdrop.registry import look_up, resolve

    found = []
    for name in methods:
        budgeted = "keep" in getattr(look_up(name), "model_fields", ())
        for keep in (budgets if budgeted else ()) or (None,):
            knobs = dict(settings.knobs) if keep is None else dict(settings.knobs) | {"keep": keep}
            resolve(name, **knobs)
            own = replace(settings, method=name, knobs=knobs, out=None)
            found.append(own if settings.out is None else replace(own, out=settings.out / own.folder.name))
    return found


def sweep(wanted: Sequence[Settings], load: Load, evaluate: Evaluate) -> Iterator[Outcome]:
    """Do the runs, one after the other; one that the method or the model refuses does not end the others.

    Args:
        wanted: runs of one model.
        load: loads it.
        evaluate: does one run with it.
    """
    loaded = load(wanted[0])
    for settings in wanted:
        try:
            yield Outcome(settings, evaluate(settings, loaded))
        except MustDropError as error:
            yield Outcome(settings, None, error)
