"""What a method asks of one prompt: budgets turned into numbers, before any work is done.

The part of each of its media is worked out in `mustdrop.runtime.vision.media_plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mustdrop import budget
from mustdrop.budget import keep_text
from mustdrop.errors import BudgetError
from mustdrop.method import Method


@dataclass(frozen=True)
class RowPlan:
    """Numbers for one prompt.

    Attributes:
        total: vision tokens of the prompt.
        tokens: equal-token budget of the prefill stage in tokens, None where thresholds or the rank rule decide.
        at_most: vision tokens that may enter the language model.
        at_least: vision tokens that merging must leave.
        exceeds: why the prompt keeps more than its budget, for a warning; empty where it does not.
        spared: whether the filters leave one token each where they cannot meet the budget, which is an error otherwise.
    """

    total: int
    tokens: float | None
    at_most: int
    at_least: int
    exceeds: str = ""
    spared: bool = False


def plan_row(method: Method, total: int, n_layers: int, layers: tuple[int, ...], spared: bool = False) -> RowPlan:
    """Turn the budgets of `method` into numbers for a prompt with `total` vision tokens.

    Args:
        method: whose budgets.
        total: vision tokens.
        n_layers: decoder layers.
        layers: filter layers.
        spared: see `RowPlan`.

    Raises:
        BudgetError: a budget that the filter layers cannot meet, unless `spared`; with `Method.strict`, also one above
            the prompt's tokens or below one token.
    """
    if not total:
        return RowPlan(0, None, 0, 0)
    tokens, strict, exceeds = None, method.strict, ""
    keep = None if method.prefill is None else method.prefill.keep
    if keep is not None:
        tokens = budget.tokens_of(keep, total, strict=strict)
    decode = None if method.decode is None else method.decode.keep
    if strict and isinstance(decode, int) and decode > total:
        raise BudgetError(f"DecodeCachePruner.keep={decode} is more than the {total} vision tokens of this prompt.")
    at_most, at_least = total, 0 if tokens is None else _merge_floor(tokens, total)
    vision = method.vision
    if vision is not None and vision.selects:
        if not isinstance(vision.keep, str):
            at_most = math.floor(budget.tokens_of(vision.keep, total, "VisionStagePruner.keep", strict) + 1e-6)
            at_least = at_most
        elif tokens is not None and vision.keep == "auto":
            at_most = budget.entry(total, n_layers, layers, tokens, vision.taper_at(tokens / total))
    if tokens is not None:
        # the counts depend on how many tokens merging leaves; the most that can come must be possible
        survivors = survivors_of(method, at_most, n_layers, layers, tokens, spared)
        cost = sum(n * width for n, width in zip((at_most, *survivors), budget.spans(n_layers, layers), strict=True))
        if cost > n_layers * _asked(keep, total) + 1e-6:
            exceeds = f"keep={keep}"
    elif vision is not None and at_most > _asked(vision.keep, total) + 1e-6:
        exceeds = f"VisionStagePruner.keep={vision.keep}"
    if exceeds:
        exceeds += (
            f" of {total} vision tokens cannot be met: {_least(spared, layers)}, and such a prompt keeps more than its "
            "budget. strict=True refuses it."
        )
    return RowPlan(total, tokens, at_most, min(at_least, at_most), exceeds, spared)


def plan_rows(totals: Sequence[int], plan: Callable[[int, bool], RowPlan]) -> list[RowPlan]:
    """A plan for each prompt of a batch.

    A prompt whose budget the filters cannot meet is spared where others of its batch meet theirs: a batch is not lost
    for one item.

    Args:
        totals: vision tokens per prompt.
        plan: makes a plan from a total and `RowPlan.spared`.

    Raises:
        BudgetError: none of the prompts with vision tokens can meet its budget, or `Method.strict` refuses one.
    """
    rows: list[RowPlan | BudgetError] = []
    for total in totals:
        try:
            rows.append(plan(total, False))
        except BudgetError as error:
            rows.append(error)
    refused = [row for row in rows if isinstance(row, BudgetError)]
    if refused and not any(isinstance(row, RowPlan) and row.total for row in rows):
        raise refused[0]
    return [plan(n, True) if isinstance(row, BudgetError) else row for n, row in zip(totals, rows, strict=True)]


def survivors_of(
    method: Method, entering: int, n_layers: int, layers: tuple[int, ...], tokens: float, spared: bool = False
) -> tuple[int, ...]:
    """Tokens after each filter of the prefill stage, of `entering` tokens and for a budget of `tokens` equal ones.

    Raises:
        BudgetError: the filters cannot meet it, and the prompt is not `spared` (see `RowPlan`), or the method strict.
    """
    keep = None if method.prefill is None else method.prefill.keep
    # a share that larger pictures meet is not refused for a small one; a number of tokens fits the small ones anyway
    strict = method.strict or not isinstance(keep, float)
    try:
        return budget.spread(entering, n_layers, layers, tokens, f"keep={keep}", strict)
    except BudgetError:
        if method.strict or not spared or not layers:
            raise
        return (1,) * len(layers)


def _least(spared: bool, layers: tuple[int, ...]) -> str:
    """What stays where a budget cannot be met."""
    if spared:
        return f"all of them enter the layers up to {layers[0]}, where the first filter is, and one stays behind each"
    return "a token is the least that stays"


def _asked(keep: budget.Keep | str | None, total: int) -> float:
    """What a budget asks for; infinite where there is none."""
    if keep is None or isinstance(keep, str):
        return math.inf
    return keep * total if isinstance(keep, float) else keep


#: Vision tokens of a prompt beyond all that come: what cannot be met there can be met nowhere.
_ENDLESS = 1_000_000
_SMALL = 32  # vision tokens of a prompt for which the share that a message names must do


def require_possible(method: Method, n_layers: int, layers: tuple[int, ...]) -> None:
    """Refuse a share that no prompt can meet, since the layers before the first filter alone process more.

    A number of tokens is not looked at: a prompt of no more than that many always meets it.

    Raises:
        BudgetError: the message names the smallest share that can be met.
    """
    prefill = method.prefill
    if prefill is None or not isinstance(prefill.keep, float) or not layers:
        return
    try:
        plan_row(replace(method, strict=True), _ENDLESS, n_layers, layers)
        return
    except BudgetError:
        before = layers[0] + 1
    vision = method.vision.keep if method.vision is not None else 1.0
    limit = (vision if isinstance(vision, float) else 1.0) * before / n_layers  # only an endless prompt can meet it
    room = (n_layers - before) / n_layers
    least = math.ceil(100 * (limit + room / _SMALL) - 1e-6) / 100
    tokens = math.ceil(room / (least - limit))
    raise BudgetError(
        f"keep={prefill.keep} is impossible on this model: the first filter of {method.name!r} follows decoder layer "
        f"{layers[0]}, and the first {before} of {n_layers} layers alone process {keep_text(limit)} of the tokens. The "
        f"smallest possible share lies above that: keep={least} works for prompts of {tokens} vision tokens and more. "
        "Filter earlier, or drop tokens at the vision stage."
    )


def _merge_floor(tokens: float, total: int) -> int:
    """Tokens that merging must leave under a budget of `tokens` equal tokens.

    Merging does not know the question, the filters do. So merging leaves twice the budget, or half-way between
    budget and image where that is less, and the filters choose from that; at a budget of everything nothing may merge.
    """
    return math.ceil(min(2 * tokens, (tokens + total) / 2) - 1e-6)
