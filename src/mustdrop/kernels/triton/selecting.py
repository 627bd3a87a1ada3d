"""The select of a filter: one program per row finds the score of the last token that stays, bit by bit.

Scores become integers of the same order. From the highest bit on, a bit of the threshold is set where at least as many
tokens as wanted reach it; that is 32 counts of what lies in registers. Of those at the threshold itself the first stay.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mustdrop.kernels.operation import OPERATIONS
from mustdrop.kernels.triton.common import FUSED, p2

MOST = 8192  # tokens per row that a program can hold


@triton.jit
def ordered(x):
    """float32 as unsigned integers of the same order; NaN is the highest, as in a sort of torch, and -0 is 0."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(x != x, 0x7FFFFFFF, bits)
    return bits.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def threshold_of(key, pool, need):
    """The key of the last of the `need` highest in the pool, bit by bit."""
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        tried = threshold | bit
        bit = bit >> 1
        reached = tl.sum((pool & (key >= tried)).to(tl.int32), 0)
        threshold = tl.where(reached >= need, tried, threshold)
    return threshold


@triton.jit
def _select(
    score, alive, wanted, protected, importance, others, index, stays, N, M, gamma, alpha, ssb, ssk, ssn, sab, san, spb,
    spn, sib, sin, sob, son, STATISTICS: tl.constexpr, PROTECTED: tl.constexpr, IMPORTANCE: tl.constexpr,
    OTHERS: tl.constexpr, REST: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    real = n < N
    here = real & (tl.load(alive + b * sab + n * san, mask=real, other=0) != 0)
    value = tl.load(score + b * ssb + n * ssn, mask=here, other=0.0).to(tl.float32)
    if STATISTICS:
        peak = tl.load(score + b * ssb + ssk + n * ssn, mask=here, other=0.0).to(tl.float32)
        share = value / tl.maximum(tl.sum(value, 0), 1.1754943508222875e-38)
        value = tl.maximum(share / gamma, peak / alpha)
    need = tl.load(wanted + b).to(tl.int32)
    first = n < 0
    pool = here
    if PROTECTED:
        must = here & (tl.load(protected + b * spb + n * spn, mask=real, other=0) != 0)
        many = tl.sum(must.to(tl.int32), 0)
        over = many >= need  # no room for others: the protected compete among themselves
        if IMPORTANCE:
            own = tl.load(importance + b * sib + n * sin, mask=must, other=0.0).to(tl.float32)
            value = tl.where(over, own, value)
        pool = here & (must == over)
        first = must & (must != over)
        need = tl.where(over, need, need - many)
    key = ordered(value)
    need = tl.maximum(need, 0)
    threshold = threshold_of(key, pool, need)
    above = pool & (key > threshold)
    at = pool & (key == threshold)
    room = need - tl.sum(above.to(tl.int32), 0)
    stay = first | above | (at & (tl.cumsum(at.to(tl.int32), 0) <= room))
    if REST:
        stay = stay | (real & (here == 0))
    if OTHERS:
        stay = stay | (real & (tl.load(others + b * sob + n * son, mask=real, other=0) != 0))
    tl.store(stays + b * N + n, stay.to(tl.uint8), mask=real)
    spare = M - tl.sum(stay.to(tl.int32), 0)
    place = spare + tl.cumsum(stay.to(tl.int32), 0) - 1
    tl.store(index + b * M + place, n.to(tl.int64), mask=stay & (place >= 0) & (place < M))
    for m0 in range(0, M, BM):
        m = m0 + tl.arange(0, BM)
        tl.store(index + b * M + m, tl.full((BM,), -1, tl.int64), mask=(m < spare) & (m < M))


def select(
    score: Tensor,
    alive: Tensor,
    wanted: Tensor,
    slots: int,
    protected: Tensor | None = None,
    importance: Tensor | None = None,
    gamma: float = 1.0,
    alpha: float = 1.0,
    others: Tensor | None = None,
    rest: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `mustdrop.kernels.select`."""
    batch, n = alive.shape
    if n > MOST:
        reference = OPERATIONS["select"].reference
        return reference(score, alive, wanted, slots, protected, importance, gamma, alpha, others, rest)  # type: ignore[no-any-return]
    index = alive.new_empty(batch, slots, dtype=torch.long)
    stays = alive.new_empty(batch, n, dtype=torch.uint8)
    if batch and n:
        block = p2(n, 16)
        statistics = score.ndim == 3
        spare = alive if protected is None else protected
        order = score if importance is None else importance
        besides = alive if others is None else others
        _select[(batch,)](
            score, alive.view(torch.uint8), wanted.contiguous(), spare.view(torch.uint8), order,
            besides.view(torch.uint8), index, stays, n, slots, gamma, alpha, score.stride(0), score.stride(1) if statistics else 0,
            score.stride(-1), *alive.stride(), *spare.stride(), order.stride(0), order.stride(-1), *besides.stride(),
            STATISTICS=statistics, PROTECTED=protected is not None, IMPORTANCE=importance is not None,
            OTHERS=others is not None and not rest, REST=rest, BN=block, BM=min(block, p2(slots, 16)),
            num_warps=min(32, max(4, block // 512)), num_stages=1, **FUSED,
        )  # fmt: skip
    else:
        index.fill_(-1)
    return index, stays.view(torch.bool)
