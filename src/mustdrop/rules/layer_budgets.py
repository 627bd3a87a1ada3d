"""Splitting a budget of cache entries over decoder layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_TINY = np.finfo(np.float64).tiny


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
    given, room, wanted = (x.detach().cpu().numpy() for x in (mass, entries, count))
    most = room.T.astype(np.float64)
    least = most.clip(max=1)
    amount = np.minimum(wanted * float(most.shape[1]), most.sum(1))
    weight = given.T.astype(np.float64)
    weight = weight / np.maximum(weight.max(1, keepdims=True), _TINY)
    weight = weight + 1e-9  # a layer without mass comes last, and a prompt without any shares alike
    exact = _shares(_scale(weight, least, most, amount), weight, least, most)
    whole = np.floor(exact)
    remainder = np.where(whole < most, exact - whole, -1.0)
    rank = (-remainder).argsort(1, kind="stable").argsort(1)
    extra = (rank < (amount - whole.sum(1))[:, None]) & (whole < most)
    return torch.from_numpy((whole + extra).astype(np.int64).T).to(entries.device)


def _shares(scale: np.ndarray, weight: np.ndarray, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """`scale` (..., 1) times the weights (..., L), within their bounds."""
    return np.minimum(np.maximum(scale * weight, least), most)  # type: ignore[no-any-return]


def _scale(weight: np.ndarray, least: np.ndarray, most: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """(B, 1) factor with which the shares add up to `amount` (B,), or as near as their bounds allow.

    The sum of the shares rises with the factor, in straight lines between those at which a share meets a bound.
    """
    bends = np.sort(np.concatenate([least / weight, most / weight], 1), 1)
    sums = _shares(bends[..., None], weight[:, None], least[:, None], most[:, None]).sum(2)
    below = ((sums <= amount[:, None]).sum(1, keepdims=True) - 1).clip(min=0)
    above = (below + 1).clip(max=bends.shape[1] - 1)
    (start, end), (low, high) = ([np.take_along_axis(x, at, 1) for at in (below, above)] for x in (bends, sums))
    part = (amount[:, None] - low).clip(min=0) / np.maximum(high - low, _TINY)
    return start + (end - start) * part.clip(max=1)  # type: ignore[no-any-return]
