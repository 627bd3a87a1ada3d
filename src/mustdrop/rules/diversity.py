"""Features that differ from each other: max-min distance, determinants, and removal of duplicates.

All take features (B, N, C) of B rows that are chosen from alone, compare by cosine in float32, and give ties to the
lower index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.kernels import farthest_first, greedy_determinant
from mustdrop.kernels.reference_choices import HELD, unit

__all__ = ["farthest_first", "greedy_determinant", "unit", "without_duplicates"]


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
    held = listed @ listed.mT if order.shape[1] <= HELD else None
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
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
