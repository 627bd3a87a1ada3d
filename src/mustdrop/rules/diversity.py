"""Features that differ from each other: max-min distance, determinants, and removal of duplicates.

All take features (B, N, C) of B rows that are chosen from alone, compare by cosine in float32, and give ties to the
lower index. A loop runs over picks, never over features, and nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop import kernels

# Up to so many features per row all similarities are computed once and held (64 MiB); above, again where needed.
_HELD = 4096
# Similarities of one block where they are not held, in elements.
_BLOCK = 1 << 24
# Squared sine of the angle to the picked features below which float32 cannot tell a feature from their combinations.
_NO_VOLUME = 1e-5


def unit(x: Tensor) -> Tensor:
    """Features (..., C) of length 1, float32; those without a length stay 0."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def farthest_first(x: Tensor, count: int) -> Tensor:
    """Greedy max-min diversity: each pick is the feature whose nearest pick is farthest.

    With d(i, j) = 1 - cos(x_i, x_j), the first pick is argmax_i min_{j != i} d(i, j), each later one
    argmax_i min_{j picked} d(i, j). Source: DivPrune (arXiv 2503.02175).

    N^2 C operations for the first pick and, beyond 4096 features, N C for each later one, of which only the distance to
    the nearest pick is kept.

    Args:
        x: (B, N, C), N at least 2.
        count: picks, at most N.

    Returns:
        (B, count) long, in the order of the picks.
    """
    x = unit(x)
    held = _others(x, 0, x.shape[1]) if x.shape[1] <= _HELD else None
    pick = (_nearest(x) if held is None else held.amax(2)).argmin(1, keepdim=True)
    nearest = torch.full(x.shape[:2], -torch.inf, dtype=torch.float32, device=x.device)
    picks = [pick]
    for _ in range(count - 1):
        similar = _row(x, pick) if held is None else _take(held, pick)[:, 0]
        nearest = torch.maximum(nearest, similar).scatter(1, pick, torch.inf)
        pick = nearest.argmin(1, keepdim=True)
        picks.append(pick)
    return torch.cat(picks, 1)


def greedy_determinant(x: Tensor, quality: Tensor, count: int) -> Tensor:
    """Greedy MAP of a determinantal point process: each pick multiplies det(L_picked) by as much as possible.

    L_ij = q_i cos(x_i, x_j) q_j. With c an incremental Cholesky factor of the cosines, i would multiply the
    determinant by q_i^2 r_i, where r_i = 1 - sum_s c_si^2 is what the picks do not explain of i, and a pick j adds the
    row c_i = (cos(x_j, x_i) - sum_s c_sj c_si) / sqrt(r_j). Source: CDPruner (arXiv 2506.10967), with the recurrence of
    fast greedy MAP inference (arXiv 1709.05135).

    A feature that the picks explain wholly (a duplicate, or any feature once there are as many picks as the rank)
    multiplies by 0. When all do, those of the highest quality follow.

    N M (C + M) operations and N M numbers for M picks; the kernel is not formed.

    Args:
        x: (B, N, C).
        quality: (B, N), positive.
        count: M, at most N.

    Returns:
        (B, count) long, in the order of the picks.
    """
    x = unit(x)
    weight = quality.float().square()
    last = quality.float() - quality.float().amax(1, keepdim=True) - 1  # below every gain
    left = x.square().sum(2)
    factor = x.new_zeros(len(x), count, x.shape[1])
    gone = torch.zeros_like(left, dtype=torch.bool)
    picks = []
    for step in range(count):
        gain = torch.where(left > _NO_VOLUME, weight * left, last).masked_fill(gone, -torch.inf)
        pick = gain.argmax(1, keepdim=True)
        gone = gone.scatter(1, pick, True)
        picks.append(pick)
        before = factor[:, :step]
        own = before.gather(2, pick[:, None].expand(-1, step, -1))
        row = _row(x, pick) - (own.mT @ before)[:, 0]
        rest = left.gather(1, pick)
        row = torch.where(rest > _NO_VOLUME, row / rest.clamp(min=_NO_VOLUME).sqrt(), 0.0)
        factor[:, step] = row
        left = left - row.square()
    return torch.cat(picks, 1)


def without_duplicates(x: Tensor, order: Tensor, count: int, most: int = 8) -> Tensor:
    """What stays when features that resemble others are removed, a few per round.

    The features are a list, in `order` at first. In a round those at even places are compared with those at odd places,
    the k whose most similar partner is most similar leave, and the list becomes the even ones that remain, the most
    similar first, then the odd ones; k = min(most, what is too many). Source: VisPruner (arXiv 2412.01818), whose code
    takes lists of even length only. Where k exceeds the even places, all of them leave.

    About (R - count) / most rounds. Up to 4096 listed features, R^2 C operations once and R^2 / 4 look-ups per round;
    above, R^2 C / 4 operations per round, in blocks.

    Args:
        x: (B, N, C).
        order: (B, R) long, the features that compete.
        count: how many of them stay, at most R.
        most: removals per round.

    Returns:
        (B, count) long, the list at the end.
    """
    if not count:
        return order[:, :0]
    listed = unit(_take(x, order))
    held = listed @ listed.mT if order.shape[1] <= _HELD else None
    place = torch.arange(order.shape[1], dtype=torch.long, device=order.device).expand_as(order)
    while place.shape[1] > count:
        even, odd = place[:, ::2], place[:, 1::2]
        if held is None:
            similar, _ = kernels.best_match(_take(listed, even), _take(listed, odd))
        else:
            rows = _take(held, even)
            similar = rows.gather(2, odd[:, None].expand(-1, even.shape[1], -1)).amax(2)
        leave = min(most, place.shape[1] - count, even.shape[1])
        stay = similar.argsort(dim=1, descending=True, stable=True)[:, leave:]
        place = torch.cat([even.gather(1, stay), odd], 1)
    return order.gather(1, place)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _row(x: Tensor, index: Tensor) -> Tensor:
    """(B, N) cosines of the feature `index` (B, 1) of each row with all others, of unit features."""
    return (x @ _take(x, index).mT)[..., 0]


def _others(x: Tensor, start: int, step: int) -> Tensor:
    """(B, step, N) cosines of unit features from `start` on with all others; -inf with themselves."""
    similar = x[:, start : start + step] @ x.mT
    similar.diagonal(start, 1, 2).fill_(-torch.inf)
    return similar


def _nearest(x: Tensor) -> Tensor:
    """(B, N) cosine of each unit feature with the most similar other one, in blocks."""
    step = max(1, _BLOCK // x.shape[:2].numel())
    return torch.cat([_others(x, start, step).amax(2) for start in range(0, x.shape[1], step)], 1)
