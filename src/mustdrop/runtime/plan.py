"""What a method asks of one prompt: budgets turned into numbers, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    """

    total: int
    tokens: float | None
    at_most: int
    at_least: int


def plan_row(method: Method, total: int, n_layers: int, layers: tuple[int, ...]) -> RowPlan:
    """Turn the budgets of `method` into numbers for a prompt with `total` vision tokens.

    Raises:
        BudgetError: a budget above the prompt's tokens, or one that the filter layers cannot meet.
    """
    if not total:
        return RowPlan(0, None, 0, 0)
    tokens = None
    if method.prefill is not None and method.prefill.keep is not None:
        tokens = budget.tokens_of(method.prefill.keep, total)
    if method.decode is not None and isinstance(method.decode.keep, int) and method.decode.keep > total:
        raise BudgetError(
            f"DecodeCachePruner.keep={method.decode.keep} is more than the {total} vision tokens of this prompt."
        )
    at_most, at_least = total, 0 if tokens is None else _merge_floor(tokens, total)
    vision = method.vision
    if vision is not None and vision.selects:
        if not isinstance(vision.keep, str):
            at_most = math.floor(budget.tokens_of(vision.keep, total, "VisionStagePruner.keep") + 1e-6)
            at_least = at_most
        elif tokens is not None and vision.keep == "auto":
            at_most = budget.entry(total, n_layers, layers, tokens, vision.taper_at(tokens / total))
    if tokens is not None:
        # the counts depend on how many tokens merging leaves; the most that can come must be possible
        budget.spread(
            at_most,
            n_layers,
            layers,
            tokens,
            what=f"keep={method.prefill.keep}" if method.prefill else "keep",
        )
    return RowPlan(total, tokens, at_most, min(at_least, at_most))


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
        plan_row(method, _ENDLESS, n_layers, layers)
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

    Merging does not know the question, the filters do. So merging leaves twice the budget, or half-way between budget
    and
    image where that is less, and the filters choose from that; at a budget of everything nothing may merge.
    """
    return math.ceil(min(2 * tokens, (tokens + total) / 2) - 1e-6)


def rows_of_media(sizes: Sequence[int], totals: Sequence[int]) -> list[int] | None:
    """Which prompt each medium belongs to: media fill the prompts' placeholders in order. None if they do not fit.

    Args:
        sizes: features per medium; empty ones (a row without an image) go with the row before.
        totals: placeholders per prompt.
    """
    rows, medium = [], 0
    for row, total in enumerate(totals):
        while medium < len(sizes) and (total > 0 or not sizes[medium]):
            rows.append(row)
            total -= sizes[medium]
            medium += 1
        if total:
            return None
    return rows if medium == len(sizes) else None
