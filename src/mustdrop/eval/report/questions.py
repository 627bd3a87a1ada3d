"""Question by question: two runs of one set-up side by side, and accuracy by what the questions ask for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mustdrop.eval.questions import Told
from mustdrop.eval.report.paired import Groups, Paired, groups, paired

RIGHT = 0.5  # credit from which an answer counts as right: benchmarks with soft accuracy give less than one
BASELINES = ("random", "uniform", "downsample")  # what the budget costs whoever chooses
DOWNSAMPLED = "downsample"


@dataclass(frozen=True)
class Beside:
    """A run beside the unpruned one, on the same questions.

    Attributes:
        same: share of the questions that get the same text.
        apart: the exact test of right and wrong answers; None where only a server knows what is right.
        divided: accuracy on the questions that a smaller picture does not answer, and on those that it does; None
            without a run of `downsample` at this budget.
    """

    same: float
    apart: Paired | None
    divided: Groups | None


def right(told: Sequence[Told]) -> list[bool] | None:
    """Whether each answer counts as right; None where only a server knows."""
    if any(one.credit is None for one in told):
        return None
    return [one.credit >= RIGHT for one in told if one.credit is not None]


def beside(run: Sequence[Told], unpruned: Sequence[Told], downsampled: Sequence[Told] | None = None) -> Beside | None:
    """Compare a run with the unpruned one.

    Args:
        run: its questions.
        unpruned: those of the unpruned run.
        downsampled: those of the run on smaller pictures, at the same budget.

    Returns:
        None where the two were not asked the same questions in the same order.
    """
    if [one.id for one in run] != [one.id for one in unpruned]:
        return None
    mine, whole = right(run), right(unpruned)
    small = right(downsampled) if downsampled is not None and len(downsampled) == len(run) else None
    known = mine is not None and whole is not None
    return Beside(
        statistics.fmean(float(a.text == b.text) for a, b in zip(run, unpruned, strict=True)),
        paired(mine, whole) if known and mine is not None and whole is not None else None,
        groups(mine, whole, small) if mine is not None and whole is not None and small is not None else None,
    )


def abilities(told: Sequence[Told]) -> dict[str, tuple[float, int]]:
    """Ability -> mean credit and number of questions, in the order in which they come; empty where a server scores."""
    found: dict[str, list[float]] = {}
    for one in told:
        if one.credit is None:
            return {}
        found.setdefault(one.ability, []).append(one.credit)
    return {name: (statistics.fmean(credits), len(credits)) for name, credits in found.items()}


def pooled(runs: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, tuple[float, int]]:
    """`abilities` of several benchmarks together: every question weighs the same."""
    names = dict.fromkeys(name for run in runs for name in run)
    found = {}
    for name in names:
        parts = [run[name] for run in runs if name in run]
        number = sum(count for _, count in parts)
        found[name] = (sum(mean * count for mean, count in parts) / number, number)
    return found
