"""Scores brought to a common range, per row, so that they can be added or multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.rules.groups import spread


def min_max(score: Tensor) -> Tensor:
    """Scores (B, N) from 0 (the lowest of a row) to 1 (the highest); 1 where all of a row are equal."""
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
