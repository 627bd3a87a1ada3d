"""Ragged rows: gathering a different number of tokens per batch row, padded on the left."""

from __future__ import annotations

import torch
from torch import Tensor

PAD = -1


def pack(keep: Tensor, order: Tensor | None = None) -> Tensor:
    """Indices of the True entries of `keep` (B, N), ascending by index or by `order`, left-padded with PAD.

    (B, M) long.
    """
    n = keep.shape[1]
    index = torch.arange(n, device=keep.device).expand_as(keep)
    key = (index if order is None else order).masked_fill(~keep, PAD)
    most = int(keep.sum(1).max()) if keep.numel() else 0
    place = key.argsort(dim=1, stable=True)[:, n - most :]
    return place.masked_fill(~keep.gather(1, place), PAD)


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather `x` along `dim` by `index` (B, M); PAD reads entry 0 (mask it where it matters).

    `x` may have batch size 1.
    """
    index = index.clamp(min=0).to(x.device)
    if x.shape[0] == 1 and index.shape[0] > 1:
        x = x.expand(index.shape[0], *x.shape[1:])
    if index.shape[0] == 1:  # one row: a plain index_select is several times faster than gather on wide rows
        return x.index_select(dim, index[0])
    shape = [index.shape[0]] + [1] * (x.ndim - 1)
    shape[dim] = index.shape[1]
    target = list(x.shape)
    target[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(target))


def has_padding(index: Tensor) -> bool:
    """Whether `index` holds PAD anywhere (waits for the device)."""
    return bool((index < 0).any())
