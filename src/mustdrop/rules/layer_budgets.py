"""Splitting a budget of cache entries over decoder layers."""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.rules.ranking import rank_descending

_HALVINGS = 100  # of an interval of doubles: more than they can tell apart


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
    low, high = torch.zeros_like(amount), most.amax(1) * 1e9 + 1

    def shares(scale: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(scale[:, None] * weight, least), most)

    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = shares(middle).sum(1) <= amount
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    exact = shares(low)
    whole = exact.floor()
    remainder = torch.where(whole < most, exact - whole, -1.0)
    extra = rank_descending(remainder) < (amount - whole.sum(1))[:, None]
    return (whole + (extra & (whole < most))).long().T
