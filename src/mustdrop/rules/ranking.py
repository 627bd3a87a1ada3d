"""Keeping the best n of each row, with deterministic ties and per-row counts."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_descending(score: Tensor) -> Tensor:
    """Rank of each entry of `score` (B, N) in its row: 0 is the highest; ties go to the lower index.

    Returns (B, N) long.
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(score.shape[1], dtype=torch.long, device=score.device).expand_as(order)
    )


def keep_best(
    score: Tensor,
    count: Tensor,
    alive: Tensor,
    pinned: Tensor | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """Mask of the `count` best alive tokens of each row.

    Args:
        score: (B, N), higher stays.
        count: (B,) long, tokens to keep; rows with fewer alive tokens keep all of them.
        alive: (B, N) bool, candidates.
        pinned: (B, N) bool, tokens that come before all others. If there are more than `count`, the most
            important stay.
        importance: (B, N), orders the pinned tokens among themselves; `score` if None.

    Returns:
        (B, N) bool.
    """
    rank = rank_descending(score.double().masked_fill(~alive, -torch.inf))
    if pinned is not None:
        # a second stable sort on (pinned, alive) keeps the order found above inside each class
        first = rank_descending((score if importance is None else importance).double().masked_fill(~pinned, -torch.inf))
        n = score.shape[1]
        key = torch.where(pinned & alive, first, torch.where(alive, n + rank, 2 * n + rank))
        rank = rank_descending(-key.double())
    return (rank < count[:, None]) & alive
