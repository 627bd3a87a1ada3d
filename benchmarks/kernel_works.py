"""The operations that `benchmarks.kernels` measures: sizes, arguments, and the bytes and FLOPs that they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.kernels.operation import OPERATIONS


@dataclass(frozen=True)
class Size:
    """What one model asks for: vision and text tokens, heads and key heads of dimension `dim`, width, layers."""

    name: str
    vision: int
    heads: int
    groups: int
    hidden: int
    layers: int
    side: int  # tokens per side of a window
    dim: int = 128
    text: int = 64
    batch: int = 1


SIZES = (
    Size("LLaVA-1.5-7B", 576, 32, 32, 4096, 32, 3),
    Size("LLaVA-1.5-7B, batch 8", 576, 32, 32, 4096, 32, 3, batch=8),
    Size("LLaVA-NeXT", 2880, 32, 32, 4096, 32, 3),
    Size("Qwen2.5-VL-7B, image", 1296, 28, 4, 3584, 28, 2),
    Size("Qwen2.5-VL-7B, video", 16384, 28, 4, 3584, 28, 2),
)
TINY = (Size("tiny", 64, 4, 2, 64, 3, 2, dim=16, text=6),)


@dataclass(frozen=True)
class Work:
    """One operation at one size: its variants, and the bytes and FLOPs that it needs."""

    operation: str
    size: str
    kernel: Callable[[], Any]
    eager: Callable[..., Any]
    arguments: tuple[Any, ...]
    bytes: int
    flops: int = 0


def nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def attention(size: Size, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, text rows (the last ones) and causal visibility."""
    total = size.vision + size.text
    q = torch.randn(size.batch, size.heads, total, size.dim, device=device, dtype=dtype)
    k = torch.randn(size.batch, size.groups, total, size.dim, device=device, dtype=dtype)
    rows = torch.arange(size.vision, total, device=device).expand(size.batch, -1)
    return q, k, rows, torch.arange(total, device=device) <= rows[..., None]


def scoring(size: Size, device: torch.device, dtype: torch.dtype) -> Work:
    """The statistics that a filter layer needs."""
    q, k, rows, visible = attention(size, device, dtype)
    given = (q, k, rows, visible, size.dim**-0.5)
    read = size.batch * size.heads * size.text * size.dim * dtype.itemsize + nbytes(k, visible)
    needed = read + 8 * size.batch * k.shape[2]
    flops = 2 * size.batch * size.heads * size.text * k.shape[2] * size.dim
    reference = OPERATIONS["text_statistics"].reference
    return Work("text statistics", size.name, lambda: kernels.text_statistics(*given), reference, given, needed, flops)


def works(size: Size, device: torch.device, dtype: torch.dtype) -> list[Work]:
    """All operations at one size, on random numbers."""
    n, total, c, b = size.vision, size.vision + size.text, size.hidden, size.batch
    keep = torch.rand(b, total, device=device).argsort(1)[:, : total // 4].sort(1).values
    q, k, _, visible = attention(size, device, dtype)
    one = (q[:, :, -1], k, visible[:, -1], size.dim**-0.5)
    hidden = torch.randn(b, total, c, device=device, dtype=dtype)
    tables = list(torch.randn(2, b, total, size.dim, device=device, dtype=dtype))
    place = torch.arange(total, device=device).repeat(b, 1)
    window = size.side**2
    index = torch.randperm(n, device=device)[: n // window * window].view(-1, window).sort(1).values
    slots = n - n // 4  # a quarter of the tokens merge, each into any of the others
    into = torch.randint(0, slots, (b, n - slots), device=device)
    slot = torch.cat([torch.arange(slots, device=device).expand(b, -1), into], 1)
    weight = torch.ones(b, n, device=device)
    metric = torch.randn(b, n, size.dim, device=device, dtype=dtype)
    cache = [torch.randn_like(k) for _ in range(2 * size.layers)]
    x = hidden[:, :n]
    gathered, compacted, merged = [hidden, *tables, place], (cache, keep), (x, slot, slots, weight)
    kept = keep.numel()

    def work(name: str, given: tuple[Any, ...], needed: int, flops: int = 0) -> Work:
        function, reference = getattr(kernels, name), OPERATIONS[name].reference
        return Work(name.replace("_", " "), size.name, lambda: function(*given), reference, given, needed, flops)

    return [
        scoring(size, device, dtype),
        work("key_scores", one, nbytes(k) + 5 * b * total, 2 * b * size.heads * total * size.dim),
        work("window_similarity", (x, index), nbytes(x, index) + 4 * b * len(index)),
        work("merge_tokens", merged, nbytes(x, slot, weight) + b * slots * c * dtype.itemsize),
        work("best_match", (metric[:, ::2], metric[:, 1::2]), nbytes(metric) + 6 * b * n, b * n * n // 2 * size.dim),
        work("gather_rows", (gathered, keep), 2 * kept * (c + 2 * size.dim) * dtype.itemsize + 24 * kept),
        work("compact", compacted, 2 * len(cache) * kept * size.groups * size.dim * dtype.itemsize),
    ]
