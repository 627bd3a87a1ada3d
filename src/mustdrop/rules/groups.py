"""Ranking within groups (windows of an image, frames of a video), and equal shares for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import highest, numbers
from mustdrop.indices import take

_UNSEEN = 16  # groups up to which a device shares out without being asked whether it is done


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
    return group.new_zeros(len(group), groups).scatter_add_(1, group, torch.ones_like(group))


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
    high, wide = highest(row) // side + 1, highest(column) // side + 1
    return (frame * high + down) * wide + across


def spread(values: Tensor, group: Tensor) -> Tensor:
    """(B, N) or (B, N, C): what each entry's group has, of values (B, groups) or (B, groups, C)."""
    if values.ndim == 2:
        return values.gather(1, group)
    return take(values, group, 1, padded=False)


def largest_remainder(weight: Tensor, amount: int, size: Tensor, least: int = 0) -> Tensor:
    """Split an amount over groups in proportion to their weights, exactly.

    Each group gets `least` first, as long as the amount is enough for all, and never more than it has. What a full
    group cannot take goes to the others, in proportion again. Fractions go to the largest remainders, ties to the lower
    group.

    Args:
        weight: (B, G), not negative; where all groups that are left have none, they share alike.
        amount: of each row, at most the sum of its sizes.
        size: (B, G) long, what each group has.
        least: for each group that has as much.

    Returns:
        (B, G) long, each row adds up to `amount`.
    """
    if size.shape[1] == 1:
        return torch.full_like(size, amount)
    floor = torch.zeros_like(size)
    if least:
        first = size.clamp(max=least)
        floor = torch.where((first.sum(1) <= amount).all(), first, floor)
    room = (size - floor).double()
    left = (amount - floor.sum(1, keepdim=True)).double()
    weight = weight.double().clamp(min=0)
    open_ = room > 0
    exact = torch.zeros_like(room)
    looks = size.device.type == "cpu" or size.shape[1] > _UNSEEN  # once all is shared out, more rounds change nothing
    for _ in range(size.shape[1]):
        pull = torch.where(open_, weight, 0)
        pull = torch.where(pull.sum(1, keepdim=True) > 0, pull, open_.double())
        share = left * pull / pull.sum(1, keepdim=True).clamp(min=torch.finfo(torch.double).tiny)
        full = open_ & (share >= room)
        exact = torch.where(open_, torch.minimum(share, room), exact)
        if looks and not bool(full.any()):
            break
        open_, left = open_ & ~full, left - torch.where(full, room, 0).sum(1, keepdim=True)
    whole = (exact + 1e-9).floor()
    remainder = torch.where(whole < room, exact - whole, -1.0)
    order = remainder.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(size.shape[1], dtype=torch.long, device=size.device).expand_as(order)
    )
    missing = amount - floor.sum(1, keepdim=True) - whole.sum(1, keepdim=True)
    return floor + (whole + (rank < missing)).long()


def best_in_groups(score: Tensor, group: Tensor, budget: Tensor, count: int) -> Tensor:
    """The best of each group, as many as it may keep.

    Args:
        score: (B, N), higher stays.
        group: (B, N) long, from 0 to G - 1.
        budget: (B, G) long, no more than the group has.
        count: what the budgets of each row add up to.

    Returns:
        (B, M) long, ascending.
    """
    stays = rank_in_group(score, group) < budget.gather(1, group)
    return kernels.select(stays.float(), stays, numbers([count] * len(score), score.device), count)[0]


def the_rest(chosen: Tensor, n: int) -> Tensor:
    """(n - K,) long, ascending: the numbers from 0 to n - 1 without the K different ones that are `chosen`."""
    rest = torch.ones(1, n, dtype=torch.bool, device=chosen.device).scatter(1, chosen[None], False)
    left = n - len(chosen)
    return kernels.select(rest.float(), rest, numbers([left], chosen.device), left)[0][0]


def share_of(count: int, share: float, up: bool = False) -> int:
    """A share of a number, as tensors of whole numbers would have it."""
    exact = np.float32(count) * np.float32(share)
    return int(np.ceil(exact)) if up else int(exact + np.float32(1e-6))


def members(group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Entries of each group side by side, padded to the size of the largest.

    Args:
        group: (N,) long, from 0 to groups - 1.
        groups: how many.

    Returns:
        (index, real): (groups, S) long, ascending, 0 where there are no more; (groups, S) bool.
    """
    size = torch.bincount(group, minlength=groups)
    order = group.argsort(stable=True)
    place = torch.arange(max(1, int(size.max())), dtype=torch.long, device=group.device)
    real = place < size[:, None]
    at = (size.cumsum(0) - size)[:, None] + place
    return torch.where(real, order[at.clamp(max=len(order) - 1)], 0), real
