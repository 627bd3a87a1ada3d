"""Ranking within groups (windows of an image, frames of a video), and equal shares for them."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_in_group(score: Tensor, group: Tensor) -> Tensor:
    """Rank of each entry among those of its group: 0 is the highest; ties go to the lower index.

    Args:
        score: (B, N).
        group: (B, N) long, any numbers.

    Returns:
        (B, N) long.
    """
    best = score.argsort(dim=1, descending=True, stable=True)
    order = best.gather(1, group.gather(1, best).argsort(dim=1, stable=True))
    sorted_group = group.gather(1, order)
    place = torch.arange(group.shape[1], dtype=torch.long, device=group.device).expand_as(group)
    starts = torch.ones_like(group, dtype=torch.bool)
    starts[:, 1:] = sorted_group[:, 1:] != sorted_group[:, :-1]
    first = place.masked_fill(~starts, 0).cummax(1).values
    return torch.empty_like(group).scatter_(1, order, place - first)


def sizes(group: Tensor, groups: int) -> Tensor:
    """(B, groups) long, entries of each group; `group` (B, N) holds numbers from 0 to groups - 1."""
    return torch.nn.functional.one_hot(group, groups).sum(1)


def windows(frame: Tensor, row: Tensor, column: Tensor, side: int) -> Tensor:
    """Number of the square window of `side` rows and columns that each feature lies in; windows stay in their frame.

    Args:
        frame: (B, N) long.
        row: (B, N) long, in the frame.
        column: (B, N) long, in the frame.
        side: of the windows, in features.

    Returns:
        (B, N) long.
    """
    down, across = row // side, column // side
    high, wide = int(down.max()) + 1, int(across.max()) + 1
    return (frame * high + down) * wide + across
