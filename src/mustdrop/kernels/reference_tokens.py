"""Similarity, merging, matching and gathering of tokens, readable. The Triton kernels have the same signatures."""

from __future__ import annotations

import torch
from torch import Tensor

# Sources x destinations that may exist at once when tokens are matched, in elements.
_CHUNK = 1 << 24


def window_similarity(x: Tensor, index: Tensor) -> Tensor:
    """See `mustdrop.kernels.window_similarity`."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)[:, index]  # (B, W, n, C)
    n = index.shape[1]
    return (unit.sum(2).square().sum(-1) - unit.square().sum((2, 3))) / (n * (n - 1))


def merge_tokens(x: Tensor, slot: Tensor, slots: int, weight: Tensor | None = None) -> Tensor:
    """See `mustdrop.kernels.merge_tokens`."""
    goes = slot.masked_fill(slot < 0, slots)
    each = x.new_ones(goes.shape, dtype=torch.float32) if weight is None else weight.float()
    whole = torch.zeros(goes.shape[0], slots + 1, dtype=torch.float32, device=x.device).scatter_add_(1, goes, each)
    values = x.float() if weight is None else x.float() * each[..., None]
    total = x.new_zeros(x.shape[0], slots + 1, x.shape[2], dtype=torch.float32)
    total = total.scatter_add_(1, goes[..., None].expand_as(values), values)
    whole = whole[:, :slots, None]
    return (total[:, :slots] / torch.where(whole > 0, whole, 1.0)).to(x.dtype)


def best_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """See `mustdrop.kernels.best_match`."""
    to = torch.nn.functional.normalize(b.float(), dim=-1).mT
    most = min(_CHUNK, a.numel() + b.numel())  # nothing is larger than the inputs
    step = max(1, most // max(1, a.shape[0] * b.shape[1]))
    parts = [a[:, start : start + step] for start in range(0, a.shape[1], step)]
    best = [torch.nn.functional.normalize(part.float(), dim=-1).matmul(to).max(-1) for part in parts]
    if not best:
        return a.new_zeros(a.shape[:2], dtype=torch.float32), a.new_zeros(a.shape[:2], dtype=torch.long)
    return torch.cat([found.values for found in best], 1), torch.cat([found.indices for found in best], 1)


def gather_rows(tensors: list[Tensor], index: Tensor, zero: bool = False) -> list[Tensor]:
    """See `mustdrop.kernels.gather_rows`."""
    gone = index < 0
    out = [take(x, index, 1) for x in tensors]
    if not zero:
        return out
    return [x.masked_fill(gone.view(*gone.shape, *[1] * (x.ndim - 2)), 0) for x in out]


def cut_mask(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """See `mustdrop.kernels.cut_mask`."""
    return take(take(mask, rows, 2), columns, 3)


def compact(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    """See `mustdrop.kernels.compact`."""
    return [take(x, index, 2) for x in tensors]


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather `x` along `dim` by `index` (B, M); -1 reads entry 0 (mask it where it matters).

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
