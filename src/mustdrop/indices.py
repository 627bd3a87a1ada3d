"""Ragged rows: gathering a different number of tokens per batch row, padded on the left.

Which tokens are where is known to the host: a few hundred small operations on indices would each be a launch on a
device, and a question about one of them a wait. Only the finished indices go to the device, once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mustdrop.kernels.reference_tokens import take

__all__ = ["HOST", "PAD", "Sent", "has_padding", "on", "pack", "take"]

PAD = -1
HOST = torch.device("cpu")


def on(x: Tensor, device: torch.device) -> Tensor:
    """`x` on another device. The host does not wait where it only sends."""
    return x if x.device == device else x.to(device, non_blocking=x.device.type == "cpu")


@dataclass(frozen=True)
class Sent:
    """A tensor on its way to the host.

    What a device is asked to do later runs meanwhile: who waits for the tensor does not wait for that.

    Attributes:
        tensor: on the host, complete when `arrived` says so; on other devices than CUDA's and ROCm's, still there.
        arrived: what marks the end of the copy, None where there is nothing to wait for.
    """

    tensor: Tensor
    arrived: torch.cuda.Event | None = None

    @classmethod
    def off(cls, x: Tensor) -> Sent:
        """`x`, sent off now."""
        running = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # an imitated device has no streams
        if x.device.type != "cuda" or not running:
            return cls(x)
        copy = x.to(HOST, non_blocking=True)  # into pinned memory
        return cls(copy, torch.cuda.current_stream(x.device).record_event())

    def received(self) -> Tensor:
        """The tensor on the host."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor.to(HOST)


def pack(keep: Tensor, order: Tensor | None = None) -> Tensor:
    """Indices of the True entries of `keep` (B, N), ascending by index or by `order`, left-padded with PAD.

    (B, M) long.
    """
    if keep.device == HOST and (order is None or order.device == HOST):
        return torch.from_numpy(_packed(keep.numpy(), None if order is None else order.numpy()))
    n = keep.shape[1]
    index = torch.arange(n, dtype=torch.long, device=keep.device).expand_as(keep)
    key = (index if order is None else order).masked_fill(~keep, PAD)
    most = int(keep.sum(1).max()) if keep.numel() else 0
    place = key.argsort(dim=1, stable=True)[:, n - most :]
    return place.masked_fill(~keep.gather(1, place), PAD)


def _packed(keep: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    found = [row.nonzero()[0] for row in keep]
    if order is not None:
        found = [place[own[place].argsort(kind="stable")] for place, own in zip(found, order, strict=True)]
    most = max(map(len, found), default=0)
    index = np.full((len(found), most), PAD, dtype=np.int64)
    for row, place in zip(index, found, strict=True):
        row[most - len(place) :] = place
    return index


def has_padding(index: Tensor) -> bool:
    """Whether `index`, as `pack` makes it, holds PAD anywhere (waits for its device); one row alone never does."""
    if len(index) < 2:
        return False
    return bool((index.numpy() < 0).any() if index.device == HOST else (index < 0).any())
