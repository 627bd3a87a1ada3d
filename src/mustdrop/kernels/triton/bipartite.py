"""Merging in the layers of an encoder: a launch matches, one makes slots of the matches, one merges what is in a slot.

Where the keys of several heads are matched, each program adds them up as it reads them: for the few hundred tokens of
an encoder that takes less time than one launch more. The select is that of `selecting`: it sorts nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mustdrop.kernels.operation import OPERATIONS
from mustdrop.kernels.reference_merging import CHAINED, NARROW, SCANNED
from mustdrop.kernels.triton.common import FUSED, TIGHT, p2, plain
from mustdrop.kernels.triton.matching import best_match
from mustdrop.kernels.triton.selecting import MOST, ordered, threshold_of


@triton.jit
def _summed(x, n, c, inside, heads, sxh):
    """The sum over the heads of some tokens, and 1 / its length: a mean has the same direction."""
    total = tl.zeros(inside.shape, tl.float32)
    for h in range(heads):
        total += tl.load(x + h * sxh + n + c, mask=inside, other=0.0).to(tl.float32)
    return total, 1.0 / tl.maximum(tl.sqrt(tl.sum(total * total, 1)), 1e-12)


@triton.jit
def _closest(
    x, lengths, best, where, N, C, heads, sxb, sxh, sxn, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    RAGGED: tl.constexpr,
):  # fmt: skip
    """BM sources against all destinations of their row."""
    b = tl.program_id(1).to(tl.int64)
    length = N
    if RAGGED:
        length = tl.load(lengths + b).to(tl.int32)
    there = length // 2
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    row = x + b * sxb
    mine = (i < (N + 1) // 2)[:, None] & (c < C)[None, :]
    own, scale_own = _summed(row, 2 * i[:, None] * sxn, c[None, :], mine, heads, sxh)
    column = tl.arange(0, BN)
    top = tl.full((BM, BN), float("-inf"), tl.float32)
    at = tl.zeros((BM, BN), tl.int32)
    for n0 in range(0, there, BN):
        n = n0 + column
        inside = (n < there)[:, None] & (c < C)[None, :]
        other, scale = _summed(row, (2 * n + 1)[:, None] * sxn, c[None, :], inside, heads, sxh)
        dots = tl.dot(own, tl.trans(other), input_precision="ieee") * scale[None, :]
        similar = tl.where((n < there)[None, :], dots, float("-inf"))
        at = tl.where(similar > top, n0, at)
        top = tl.maximum(top, similar)
    high = tl.max(top, 1)
    found = tl.min(tl.where(top == high[:, None], at + column[None, :], N), 1)
    sources = (N + 1) // 2
    tl.store(best + b * sources + i, high * scale_own, mask=i < sources)
    tl.store(where + b * sources + i, found.to(tl.int64), mask=i < sources)


@triton.jit
def _slots(
    similar, best, numbers, lengths, slot, N, number, protected, BS: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """One row: the sources that are closest go, the others move up."""
    b = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BS)
    length = N
    if RAGGED:
        length = tl.load(lengths + b).to(tl.int32)
        number = tl.load(numbers + b).to(tl.int32)
    number = tl.maximum(tl.minimum(number, (length - protected) // 2), 0)
    sources = (length + 1) // 2
    real = s < sources
    pool = real & (2 * s >= protected)
    base = b * ((N + 1) // 2)
    key = ordered(tl.load(similar + base + s, mask=pool, other=0.0))
    threshold = threshold_of(key, pool, number)
    above = pool & (key > threshold)
    at = pool & (key == threshold)
    room = number - tl.sum(above.to(tl.int32), 0)
    goes = (number > 0) & (above | (at & (tl.cumsum(at.to(tl.int32), 0) <= room)))
    place = tl.cumsum((real & (goes == 0)).to(tl.int32), 0) - 1
    to = tl.load(best + base + s, mask=goes, other=0).to(tl.int32) + sources - number
    even = tl.where(goes, to, place)
    odd = s + sources - number
    even = tl.where(number > 0, even, 2 * s)
    odd = tl.where(number > 0, odd, 2 * s + 1)
    even = tl.where(real, even, -1)
    odd = tl.where(s < length // 2, odd, -1)
    tl.store(slot + b * N + 2 * s, even.to(tl.int64), mask=2 * s < N)
    tl.store(slot + b * N + 2 * s + 1, odd.to(tl.int64), mask=2 * s + 1 < N)


@triton.jit
def _sized(
    x, slot, size, names, out, sizes, bias, firsts, N, M, C, lowest, sxb, sxn, slb, sln, szb, szn, snb, snn,
    SIZED: tl.constexpr, NAMED: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One slot: it looks for its tokens, and reads them one after the other."""
    m = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BN)
    mine = tl.load(slot + b * slb + n * sln, mask=n < N, other=-1).to(tl.int32) == m
    each = mine.to(tl.float32)
    if SIZED:
        each = tl.load(size + b * szb + n * szn, mask=mine, other=0.0)
    whole = tl.sum(each, 0)
    count = tl.sum(mine.to(tl.int32), 0)
    name = n
    if NAMED:
        name = tl.load(names + b * snb + n * snn, mask=mine, other=0).to(tl.int32)
    first = tl.min(tl.where(mine, name, 2147483647), 0)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float32)
    last = -1
    for _ in range(count):
        i = tl.min(tl.where(mine & (n > last), n, BN), 0)
        weight = tl.sum(tl.where(n == i, each, 0.0), 0)
        row = x + b * sxb + i.to(tl.int64) * sxn
        total += tl.load(row + c, mask=c < C, other=0.0).to(tl.float32) * weight
        last = i
    mean = total / tl.where(whole > 0, whole, 1.0)
    tl.store(out + (b * M + m) * C + c, mean.to(out.dtype.element_ty), mask=c < C)
    if tl.program_id(2) == 0:
        log = tl.where(whole > 0, tl.log(tl.where(whole > 0, whole, 1.0)), lowest)
        tl.store(sizes + b * M + m, whole)
        tl.store(bias + b * M + m, log.to(bias.dtype.element_ty))
        tl.store(firsts + b * M + m, tl.where(count > 0, first, 0).to(tl.int64))


@triton.jit
def _followed(slots, out, N, width, BN: tl.constexpr, COUNT: tl.constexpr):
    """BN tokens through all moves; `width` is how many tokens each move takes."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    b = tl.program_id(1).to(tl.int64)
    place = tl.load(slots[0] + b * width[0] + n, mask=n < N, other=-1)
    for t in tl.static_range(1, COUNT):
        place = tl.load(slots[t] + b * width[t] + place, mask=place >= 0, other=-1)
    tl.store(out + b * N + n, place, mask=n < N)


def bipartite_slots(
    x: Tensor, number: int, protected: int = 0, numbers: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """See `mustdrop.kernels.bipartite_slots`."""
    x = plain(x)
    batch, n, channels = x.shape[0], x.shape[-2], x.shape[-1]
    sources = (n + 1) // 2
    ragged = numbers is not None and lengths is not None
    wide = channels > NARROW
    if sources > MOST or n < 2 or (wide and (ragged or x.ndim == 4)):
        reference = OPERATIONS["bipartite_slots"].reference
        return reference(x, number, protected, numbers, lengths)  # type: ignore[no-any-return]
    slot = x.new_empty(batch, n, dtype=torch.long)
    if not slot.numel():
        return slot
    spare = slot
    if numbers is not None and lengths is not None:
        numbers, lengths = numbers.contiguous(), lengths.contiguous()
    else:
        numbers = lengths = spare
    if wide:
        best, where = best_match(x[:, ::2], x[:, 1::2])
    else:
        best = x.new_empty(batch, sources, dtype=torch.float32)
        where = x.new_empty(batch, sources, dtype=torch.long)
        block = p2(channels, 16)
        heads, step = (1, 0) if x.ndim == 3 else (x.shape[1], x.stride(1))
        fits = block <= 128 and (block == channels or not TIGHT)
        _closest[(triton.cdiv(sources, 16), batch)](
            x, lengths, best, where, n, channels, heads, x.stride(0), step, x.stride(-2), BM=16,
            BN=32 if fits else 16, BC=block, RAGGED=ragged, num_warps=4, num_stages=2, **FUSED,
        )  # fmt: skip
    _slots[(batch,)](
        best, where, numbers, lengths, slot, n, number, protected, BS=p2(sources, 16), RAGGED=ragged,
        num_warps=min(16, max(4, p2(sources) // 512)), **FUSED,
    )  # fmt: skip
    return slot


def merge_sized(
    x: Tensor, slot: Tensor, slots: int, size: Tensor | None = None, names: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `mustdrop.kernels.merge_sized`."""
    x = plain(x)
    batch, n, channels = x.shape
    if n > SCANNED or not n or not channels:
        reference = OPERATIONS["merge_sized"].reference
        return reference(x, slot, slots, size, names)  # type: ignore[no-any-return]
    out, bias = x.new_empty(batch, slots, channels), x.new_empty(batch, slots)
    sizes = x.new_empty(batch, slots, dtype=torch.float32)
    firsts = slot.new_empty(batch, slots, dtype=torch.long)
    if out.numel():
        block = min(1024, p2(channels, 32))
        weight, known = sizes if size is None else size, slot if names is None else names
        _sized[(slots, batch, triton.cdiv(channels, block))](
            x, slot, weight, known, out, sizes, bias, firsts, n, slots, channels, torch.finfo(x.dtype).min,
            *x.stride()[:2], *slot.stride(), *weight.stride(), *known.stride(), SIZED=size is not None,
            NAMED=names is not None, BN=p2(n, 32), BC=block, num_warps=4, **FUSED,
        )  # fmt: skip
    return out, sizes, bias, firsts


def followed(slots: list[Tensor]) -> Tensor:
    """See `mustdrop.kernels.followed`."""
    rest = [slot.contiguous() for slot in slots]
    place = rest.pop(0)
    if not rest or not place.numel():
        return place.new_empty(place.shape).copy_(place)
    while rest:
        some, rest = [place, *rest[: CHAINED - 1]], rest[CHAINED - 1 :]
        place = _launch_followed(some)
    return place


def _launch_followed(slots: list[Tensor]) -> Tensor:
    first = slots[0]
    batch, n = first.shape
    out = first.new_empty(batch, n)
    _followed[(triton.cdiv(n, 128), batch)](
        tuple(slots), out, n, tuple(slot.shape[1] for slot in slots), BN=128, COUNT=len(slots), num_warps=4, **FUSED
    )
    return out
