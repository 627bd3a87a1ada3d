"""Ragged rows: gathering a different number of tokens per batch row, padded on the left.

Which tokens are where is known to the host: a few hundred small operations on indices would each be a launch on a
device, and a question about one of them a wait. Only the finished indices go to the device, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.kernels.reference_tokens import take

__all__ = ["HOST", "PAD", "has_padding", "on", "pack", "take"]

PAD = -1
HOST = torch.device("cpu")


def on(x: Tensor, device: torch.device) -> Tensor:
    """`x` on another device. The host does not wait where it only sends."""
    return x if x.device == device else x.to(device, non_blocking=x.device.type == "cpu")


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


def has_padding(index: Tensor) -> bool:
    """Whether `index` holds PAD anywhere (waits for its device)."""
    return bool((index < 0).any())
