"""Similarity, merging, matching and gathering of tokens, readable. The Triton kernels have the same signatures."""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.kernels.operation import operation

# Sources x destinations that may exist at once when tokens are matched, in elements.
_CHUNK = 1 << 24
# So many numbers may exist in any case: 256 KiB. With less, a short prompt would take twice the steps.
FEW = 1 << 16


def _match_shape(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape[:2], dtype=torch.float32), a.new_empty(a.shape[:2], dtype=torch.long)


def _gathered_shape(tensors: list[Tensor], index: Tensor, zero: bool = False) -> list[Tensor]:
    return [x.new_empty(*index.shape, *x.shape[2:]) for x in tensors]


def _cut_shape(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return mask.new_empty(rows.shape[0], mask.shape[1], rows.shape[1], columns.shape[1])


def _compacted_shape(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    return [x.new_empty(index.shape[0], x.shape[1], index.shape[1], x.shape[3]) for x in tensors]


@operation(lambda x, index: x.new_empty(x.shape[0], index.shape[0], dtype=torch.float32), "merging:window_similarity")
def window_similarity(x: Tensor, index: Tensor) -> Tensor:
    """Mean pairwise cosine similarity of the tokens of each window.

    The closed form (|sum of unit vectors|^2 - sum of their squared norms) / (n (n - 1)) needs no pairwise products, so
    the features are read once.

    Args:
        x: (B, N, C).
        index: (W, n) long, tokens of each window, n at least 2.

    Returns:
        (B, W) float32.
    """
    each = unit(x)[:, index]  # (B, W, n, C)
    n = index.shape[1]
    return (each.sum(2).square().sum(-1) - each.square().sum((2, 3))) / (n * (n - 1))


@operation(
    lambda x, slot, slots, weight=None: x.new_empty(x.shape[0], slots, x.shape[2]), "merging:merge_tokens", 2, grad=True
)
def merge_tokens(x: Tensor, slot: Tensor, slots: int, weight: Tensor | None = None) -> Tensor:
    """(Weighted) means of the tokens that share a slot. A slot of one token is a copy, one without tokens is zero.

    Args:
        x: (B, N, C).
        slot: (B, N) long, slot of each token, -1 where it is gone.
        slots: M, how many there are.
        weight: (B, N), for example how many patches a token stands for; None weighs all alike.

    Returns:
        (B, M, C) of the type of `x`; sums are made in float32.
    """
    goes = slot.masked_fill(slot < 0, slots)
    return means(x, goes, slots, None if weight is None else weight.float())[0]


@operation(_match_shape, "matching:best_match", 3)
def best_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each source its most similar destination, without the matrix of similarities.

    Source: bipartite soft matching of ToMe (arXiv 2210.09461).

    Args:
        a: (B, n, C) sources.
        b: (B, m, C) destinations, m at least 1.

    Returns:
        (cosine, index): (B, n) float32 and (B, n) long. Among equals, the first.
    """
    return nearest(a, b)


@operation(_gathered_shape, "gathering:gather_rows", lambda tensors, *_, **__: -(-len(tensors) // 8), grad=True)
def gather_rows(tensors: list[Tensor], index: Tensor, zero: bool = False) -> list[Tensor]:
    """The same rows of several tensors, with one launch for up to eight of them.

    Args:
        tensors: each (B or 1, N, ...), of any type: hidden states, rotary tables, positions.
        index: (B, M) long, rows; -1 is padding.
        zero: padding becomes zero; otherwise it reads row 0.

    Returns:
        New tensors, each (B, M, ...).
    """
    out = _take_all(tensors, index, 1)
    if not zero:
        return out
    gone = index < 0
    return [x.masked_fill(gone.view(*gone.shape, *[1] * (x.ndim - 2)), 0) for x in out]


@operation(_cut_shape, "gathering:cut_mask", grad=True)
def cut_mask(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows and columns of a mask in one step.

    Args:
        mask: (B or 1, 1 or H, Q, K) of any type.
        rows: (B, n) long, -1 reads row 0.
        columns: (B, k) long, -1 reads column 0.

    Returns:
        (B, 1 or H, n, k), new.
    """
    return take(take(mask, rows, 2), columns, 3)


@operation(
    _compacted_shape, "gathering:compact", lambda tensors, *_, **__: len({t.shape[1:] for t in tensors}), grad=True
)
def compact(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    """The same entries of the keys and values of many cache layers, in one launch per shape.

    Each result has storage of its own: what is left out is freed as soon as the old tensors are.

    Args:
        tensors: each (B, G, N, D); G, N and D may differ.
        index: (B, M) long, entries that stay; -1 is padding and reads entry 0.

    Returns:
        New tensors, each (B, G, M, D).
    """
    return _take_all(tensors, index, 2)


def _each_shape(tensors: list[Tensor], index: Tensor, widths: Tensor, slots: list[int]) -> list[Tensor]:
    per = len(tensors) // max(1, len(slots))
    return [x.new_empty(index.shape[1], x.shape[1], slots[t // per], x.shape[3]) for t, x in enumerate(tensors)]


@operation(
    _each_shape, "gathering:compact_each", lambda tensors, *_, **__: len({t.shape[1:] for t in tensors}), grad=True
)
def compact_each(tensors: list[Tensor], index: Tensor, widths: Tensor, slots: list[int]) -> list[Tensor]:
    """As `compact`, where each layer keeps entries of its own, and as many as it likes.

    Args:
        tensors: each (B, G, N, D); as many of them, next to each other, belong to a layer.
        index: (L, B, M) long, entries that stay in each layer; -1 is padding and reads entry 0.
        widths: (L,) long, how many of the M columns count in each layer: `slots` on the device.
        slots: the same numbers.

    Returns:
        New tensors, each (B, G, the layer's number, D).
    """
    per = len(tensors) // max(1, len(slots))
    return [take(x, index[t // per, :, : slots[t // per]], 2) for t, x in enumerate(tensors)]


def means(x: Tensor, goes: Tensor, slots: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Weighted) means of the tokens that share a slot, and their weights together.

    Args:
        x: (B, N, C).
        goes: (B, N) long, slot of each token, `slots` where it is gone.
        slots: M, how many there are.
        weight: (B, N) float32; None weighs all alike.

    Returns:
        (B, M, C) of the type of `x`, zero without tokens, and (B, M) float32.
    """
    each = x.new_ones(goes.shape, dtype=torch.float32) if weight is None else weight
    whole = torch.zeros(goes.shape[0], slots + 1, dtype=torch.float32, device=x.device).scatter_add_(1, goes, each)
    values = x.float() if weight is None else x.float() * each[..., None]
    total = x.new_zeros(x.shape[0], slots + 1, x.shape[2], dtype=torch.float32)
    total = total.scatter_add_(1, goes[..., None].expand_as(values), values)
    whole = whole[:, :slots]
    return (total[:, :slots] / torch.where(whole > 0, whole, 1.0)[..., None]).to(x.dtype), whole


def unit(x: Tensor) -> Tensor:
    """Features (..., C) of length 1, float32; those without a length stay 0."""
    x = x.float()
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(1e-12)


def matches_at_once(batch: int, sources: int, targets: int, width: int) -> int:
    """Sources that may meet all destinations at once: what they make is not larger than the inputs, or 256 KiB."""
    most = min(_CHUNK, max(FEW, batch * (sources + targets) * width))
    return max(1, most // max(1, batch * targets))


def nearest(a: Tensor, b: Tensor, there: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`best_match` in chunks; `there` (B, m) bool says which destinations exist."""
    to = unit(b).mT
    step = matches_at_once(a.shape[0], a.shape[1], b.shape[1], a.shape[2])
    best = []
    for start in range(0, a.shape[1], step):
        similar = unit(a[:, start : start + step]).matmul(to)
        best.append((similar if there is None else similar.masked_fill(~there[:, None], -torch.inf)).max(-1))
    if not best:
        return a.new_zeros(a.shape[:2], dtype=torch.float32), a.new_zeros(a.shape[:2], dtype=torch.long)
    return torch.cat([found.values for found in best], 1), torch.cat([found.indices for found in best], 1)


def _take_all(tensors: list[Tensor], index: Tensor, dim: int) -> list[Tensor]:
    """`take` of several tensors that lie on one device."""
    index = index.clamp(min=0)
    if len(index) > 1:
        return [take(x, index, dim, False) for x in tensors]
    one = index[0]
    return [x.index_select(dim, one) for x in tensors]


def take(x: Tensor, index: Tensor, dim: int, padded: bool = True) -> Tensor:
    """Gather `x` along `dim` by `index` (B, M); -1 reads entry 0 (mask it where it matters).

    `x` may have batch size 1. Where `index` is known to hold no -1, `padded` may be False, which saves an operation.
    """
    index = (index.clamp(min=0) if padded else index).to(x.device)
    if x.shape[0] == 1 and index.shape[0] > 1:
        x = x.expand(index.shape[0], *x.shape[1:])
    if index.shape[0] == 1:  # one row: a plain index_select is several times faster than gather on wide rows
        return x.index_select(dim, index[0])
    shape = [index.shape[0]] + [1] * (x.ndim - 1)
    shape[dim] = index.shape[1]
    target = list(x.shape)
    target[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(target))
