"""Keeping the best n of each row, with deterministic ties and per-row counts."""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop import kernels


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
    protected: Tensor | None = None,
    importance: Tensor | None = None,
) -> Tensor:
    """Mask of the `count` best alive tokens of each row.

    Args:
        score: (B, N), higher stays.
        count: (B,) long, tokens to keep; rows with fewer alive tokens keep all of them.
        alive: (B, N) bool, candidates.
        protected: (B, N) bool, tokens that come before all others. If there are more than `count`, the most
            important stay.
        importance: (B, N), orders the protected tokens among themselves; `score` if None.

    Returns:
        (B, N) bool.
    """
    return kernels.select(score, alive, count, 0, protected, importance)[1]
