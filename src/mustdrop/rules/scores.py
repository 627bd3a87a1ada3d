"""Scores of a row before they are ranked: brought to a common range, or smoothed along the sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mustdrop.rules.groups import spread


def min_max(score: Tensor) -> Tensor:
    """Scores (B, N) from 0 (the lowest of a row) to 1 (the highest of it); 1 where all of a row are equal."""
    low, high = score.aminmax(dim=1, keepdim=True)
    return _between(score, low, high)


def min_max_in_groups(score: Tensor, group: Tensor, groups: int) -> Tensor:
    """As `min_max`, within the groups (B, N) of numbers from 0 to groups - 1."""
    start = score.new_full((len(score), groups), torch.inf)
    low = start.scatter_reduce(1, group, score, "amin")
    high = (-start).scatter_reduce(1, group, score, "amax")
    return _between(score, spread(low, group), spread(high, group))


def _between(score: Tensor, low: Tensor, high: Tensor) -> Tensor:
    span = high - low
    return torch.where(span > 0, (score - low) / torch.where(span > 0, span, 1.0), 1.0)


def neighbour_mean(score: Tensor, candidates: Tensor, kernel: int) -> Tensor:
    """Sliding average over the candidates among the `kernel` entries around each one.

    Source: the pooling of SnapKV (arXiv 2404.14469). What is no candidate, or beyond the ends, does not count.

    Args:
        score: (B, n) float32.
        candidates: (B, n) bool.
        kernel: width of the window; for an even one the odd entry comes before.

    Returns:
        (B, n) float32, 0 where there is no candidate in the window.
    """
    if kernel == 1:
        return score * candidates
    pad = (kernel // 2, (kernel - 1) // 2)
    weight = candidates.to(score.dtype)
    total = F.avg_pool1d(F.pad(score * weight, pad)[:, None], kernel, stride=1)[:, 0]
    seen = F.avg_pool1d(F.pad(weight, pad)[:, None], kernel, stride=1)[:, 0]
    # a window holds a whole number of candidates, so below half of one means none
    return (total / seen.clamp(min=0.5 / kernel)).masked_fill(seen * kernel < 0.5, 0.0)
