"""Splitting a budget of cache entries over decoder layers."""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.rules.ranking import rank_descending


def proportional(mass: Tensor, count: Tensor, entries: Tensor) -> Tensor:
    """Entries per layer in proportion to a mass, so that the mean over the layers is `count`.

    Source: layer budgets of TGV-KV (arXiv 2606.03075). No layer is given more than it has and none less than one: layer
    l gets clamp(lambda * mass_l, 1, entries_l), with lambda such that the sum is right. Fractions go to the largest
    remainders, ties to the lower layer.

    Args:
        mass: (L, B), not negative.
        count: (B,) long, mean over the layers.
        entries: (L, B) long, what each layer has.

    Returns:
        (L, B) long; each column adds up to L * count, or to all entries where there are fewer.
    """
    most = entries.T.double()
    least = most.clamp(max=1)
    amount = torch.minimum(count.double() * most.shape[1], most.sum(1))
    weight = mass.to(entries.device).T.double()
    weight = weight / weight.amax(1, keepdim=True).clamp(min=torch.finfo(torch.double).tiny)
    weight = weight + 1e-9  # a layer without mass comes last, and a prompt without any shares alike
    exact = _shares(_scale(weight, least, most, amount), weight, least, most)
    whole = exact.floor()
    remainder = torch.where(whole < most, exact - whole, -1.0)
    extra = rank_descending(remainder) < (amount - whole.sum(1))[:, None]
    return (whole + (extra & (whole < most))).long().T


def _shares(scale: Tensor, weight: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """`scale` (..., 1) times the weights (..., L), within their bounds."""
    return torch.minimum(torch.maximum(scale * weight, least), most)


def _scale(weight: Tensor, least: Tensor, most: Tensor, amount: Tensor) -> Tensor:
    """(B, 1) factor with which the shares add up to `amount` (B,), or as near as their bounds allow.

    The sum of the shares rises with the factor, in straight lines between those at which a share meets a bound.
    """
    bends = torch.cat([least / weight, most / weight], 1).sort(1).values
    sums = _shares(bends[..., None], weight[:, None], least[:, None], most[:, None]).sum(2)
    below = ((sums <= amount[:, None]).sum(1, keepdim=True) - 1).clamp(min=0)
    above = (below + 1).clamp(max=bends.shape[1] - 1)
    (start, end), (low, high) = ([x.gather(1, place) for place in (below, above)] for x in (bends, sums))
    part = (amount[:, None] - low).clamp(min=0) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    return start + (end - start) * part.clamp(max=1)
