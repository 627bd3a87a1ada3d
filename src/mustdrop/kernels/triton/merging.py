"""Similarity of windows and means of what merges: each reads the features once, the latter writes them once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mustdrop.kernels.triton.common import FUSED, p2, plain

#: Up to so many tokens each is compared with each; more are sorted.
COMPARED = 1 << 14


@triton.jit
def _similarity(x, index, out, sxb, sxn, siw, sit, n, C: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr):
    """One window: its rows pass through registers, BR at a time. A zero row has cosine 0 to all others."""
    w = tl.program_id(0)
    b = tl.program_id(1)
    c = tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float32)
    squares = 0.0
    for i0 in range(0, n, BR):
        i = i0 + tl.arange(0, BR)
        row = tl.load(index + w * siw + i * sit, mask=i < n, other=0)
        there = (i < n)[:, None] & (c < C)[None, :]
        v = tl.load(x + b.to(tl.int64) * sxb + row[:, None] * sxn + c[None, :], mask=there, other=0.0).to(tl.float32)
        square = tl.sum(v * v, 1)
        norm = tl.maximum(tl.sqrt(square), 1e-12)
        total += tl.sum(v / norm[:, None], 0)
        squares += tl.sum(square / (norm * norm))
    pairs = (n * (n - 1)).to(tl.float32)
    tl.store(out + b * tl.num_programs(0) + w, (tl.sum(total * total) - squares) / pairs)


@triton.jit
def _ranks(slot, members, borders, N, M, sb, sn, BI: tl.constexpr, BJ: tl.constexpr):
    """Where each token lies in the order of slots, and where each slot begins there: how many keys are smaller.

    A token's key is its slot and then its number, that of a border its slot alone. Each program compares BI keys with
    all tokens, which for a few thousand tokens takes less time than the launches of a sort.
    """
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BI + tl.arange(0, BI)  # tokens, then borders
    own = tl.load(slot + b * sb + i * sn, mask=i < N, other=0).to(tl.int32)
    own = tl.where(own < 0, M, own)
    key = tl.where(i < N, own * N + i, (i - N) * N)
    smaller = tl.zeros((BI, BJ), tl.int32)
    for j0 in range(0, N, BJ):
        j = j0 + tl.arange(0, BJ)
        other = tl.load(slot + b * sb + j * sn, mask=j < N, other=0).to(tl.int32)
        other = tl.where(other < 0, M, other) * N + j
        smaller += ((other[None, :] < key[:, None]) & (j < N)[None, :]).to(tl.int32)
    place = tl.sum(smaller, 1)
    tl.store(members + b * N + place, i, mask=i < N)
    tl.store(borders + b * (M + 1) + i - N, place, mask=(i >= N) & (i <= N + M))


@triton.jit
def _segments(
    x, weight, members, borders, out, N, M, C, sxb, sxn, swb, swn, WEIGHTED: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """One slot: the mean of its members, which lie next to each other in `members`."""
    slot = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    start = tl.load(borders + b * (M + 1) + slot)
    end = tl.load(borders + b * (M + 1) + slot + 1)
    total = tl.zeros((BC,), tl.float32)
    whole = 0.0
    for i in range(start, end):
        row = tl.load(members + b * N + i).to(tl.int64)
        v = tl.load(x + b * sxb + row * sxn + c, mask=c < C, other=0.0).to(tl.float32)
        if WEIGHTED:
            each = tl.load(weight + b * swb + row * swn).to(tl.float32)
            total += v * each
            whole += each
        else:
            total += v
            whole += 1.0
    mean = total / tl.where(whole > 0, whole, 1.0)
    tl.store(out + (b * M + slot) * C + c, mean.to(out.dtype.element_ty), mask=c < C)


def window_similarity(x: Tensor, index: Tensor) -> Tensor:
    """See `mustdrop.kernels.window_similarity`."""
    x = plain(x)
    batch, _, channels = x.shape
    windows, n = index.shape
    out = x.new_empty(batch, windows, dtype=torch.float32)
    if out.numel():
        block = p2(channels, 32)
        # rows at a time, as far as registers go: measured on an H200
        rows = 1 if n <= 4 or block > 4096 else 4 if block > 2048 else 2
        _similarity[(windows, batch)](
            x, index, out, *x.stride()[:2], *index.stride(), n, C=channels, BC=block, BR=rows,
            num_warps=16 if block > 4096 else 8 if rows == 4 else 4 if block > 256 else 1, **FUSED,
        )  # fmt: skip
    return out


def merge_tokens(x: Tensor, slot: Tensor, slots: int, weight: Tensor | None = None) -> Tensor:
    """See `mustdrop.kernels.merge_tokens`."""
    x = plain(x)
    batch, n, channels = x.shape
    out = x.new_empty(batch, slots, channels)
    if not out.numel():
        return out
    if not n:
        return out.zero_()
    members, borders = _sorted(slot, slots)
    block = min(1024, p2(channels, 32))
    _segments[(slots, batch, triton.cdiv(channels, block))](
        x, x if weight is None else weight, members, borders, out, n, slots, channels, *x.stride()[:2],
        *((0, 0) if weight is None else weight.stride()), WEIGHTED=weight is not None, BC=block, num_warps=4, **FUSED,
    )  # fmt: skip
    return out


def _sorted(slot: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """(B, N) tokens by slot, those that are gone last, and (B, slots + 1) where each slot begins and the last one ends.

    Shapes do not depend on data, so nothing waits for the device.
    """
    batch, n = slot.shape
    if n <= COMPARED and (slots + 1) * n < 2**31:  # the keys are 32 bits wide
        members = slot.new_empty(batch, n, dtype=torch.int32)
        borders = slot.new_empty(batch, slots + 1, dtype=torch.int32)
        _ranks[(triton.cdiv(n + slots + 1, 64), batch)](
            slot, members, borders, n, slots, *slot.stride(), BI=64, BJ=64, num_warps=4, **FUSED
        )
        return members, borders
    by_slot, members = slot.masked_fill(slot < 0, slots).sort(dim=1, stable=True)
    edges = torch.arange(slots + 1, dtype=torch.long, device=slot.device).expand(batch, -1).contiguous()
    return members, torch.searchsorted(by_slot, edges)
