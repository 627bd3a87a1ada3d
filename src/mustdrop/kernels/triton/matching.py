"""Best destination of each source by cosine, without the matrix of similarities.

The dot products are those of the raw tokens, so bfloat16 is not rounded a second time; norms are applied in float32
afterwards. Maximum and index run along per element of the tile: the loop has no reduction across threads, and one comes
at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mustdrop.kernels.triton.common import FUSED, p2, plain, precision


@triton.jit
def _norms(x, out, N, C, sxb, sxn, BN: tl.constexpr, BC: tl.constexpr):
    """1 / |row|; a row of zeros gets a finite number."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1)
    total = tl.zeros((BN,), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        inside = (n < N)[:, None] & (c < C)[None, :]
        v = tl.load(x + b.to(tl.int64) * sxb + n[:, None] * sxn + c[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(v * v, 1)
    tl.store(out + b * N + n, 1.0 / tl.maximum(tl.sqrt(total), 1e-12), mask=n < N)


@triton.jit
def _match(
    a, to, norm_a, norm_b, best, where, NA, NB, C, sab, san, sbb, sbn, BM: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM sources against all destinations."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    there = i < NA
    b = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BN)
    top = tl.full((BM, BN), float("-inf"), tl.float32)
    at = tl.zeros((BM, BN), tl.int32)
    for n0 in range(0, NB, BN):
        n = n0 + column
        dots = tl.zeros((BM, BN), tl.float32)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            x = tl.load(a + b * sab + i[:, None] * san + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
            y = tl.load(to + b * sbb + n[:, None] * sbn + c[None, :], mask=(n < NB)[:, None] & (c < C)[None, :],
                        other=0.0)  # fmt: skip
            dots = tl.dot(x, tl.trans(y), dots, input_precision=PRECISION)
        scale = tl.load(norm_b + b * NB + n, mask=n < NB, other=0.0)
        similar = tl.where((n < NB)[None, :], dots * scale[None, :], float("-inf"))
        at = tl.where(similar > top, n0, at)
        top = tl.maximum(top, similar)
    high = tl.max(top, 1)
    found = tl.min(tl.where(top == high[:, None], at + column[None, :], NB), 1)  # among equals, the first
    scale = tl.load(norm_a + b * NA + i, mask=there, other=0.0)
    tl.store(best + b * NA + i, high * scale, mask=there)
    tl.store(where + b * NA + i, found.to(tl.int64), mask=there)


def best_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """See `mustdrop.kernels.best_match`."""
    a, b = plain(a), plain(b)
    batch, sources, channels = a.shape
    destinations = b.shape[1]
    best = a.new_empty(batch, sources, dtype=torch.float32)
    where = a.new_empty(batch, sources, dtype=torch.long)
    if not best.numel():
        return best, where
    norms = []
    for x in (a, b):
        norm = x.new_empty(batch, x.shape[1], dtype=torch.float32)
        _norms[(triton.cdiv(x.shape[1], 16), batch)](
            x, norm, x.shape[1], channels, *x.stride()[:2], BN=16, BC=min(256, p2(channels, 16)), num_warps=4, **FUSED
        )
        norms.append(norm)
    high, wide = (32, 32) if a.dtype == torch.float32 else (32, 128)  # measured on an H200
    _match[(triton.cdiv(sources, high), batch)](
        a, b, *norms, best, where, sources, destinations, channels, *a.stride()[:2], *b.stride()[:2],
        BM=high, BN=wide, BC=min(64, p2(channels, 16)), PRECISION=precision(a), num_warps=4, num_stages=3, **FUSED,
    )  # fmt: skip
    return best, where
