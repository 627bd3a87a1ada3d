"""Removal of duplicates in rounds: one program per row keeps the list and runs all rounds, in one launch.

The list lies in scratch memory twice, as it was before and as it is after a round. Its order comes from counting what
ranks before, so nothing is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mustdrop.kernels.operation import OPERATIONS
from mustdrop.kernels.triton.common import FUSED, p2
from mustdrop.kernels.triton.gathering import gather_rows
from mustdrop.kernels.triton.greedy import MOST, cosines


@triton.jit
def _rounds(
    cosine, order, place, similar, out, R, M, MOST, sob, son, BE: tl.constexpr, BO: tl.constexpr
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    cosine += b * R * R
    now = place + b * 2 * R
    similar += b * R
    side = 0
    for i0 in range(0, R, BO):
        i = i0 + tl.arange(0, BO)
        tl.store(now + i, i, mask=i < R)
    tl.debug_barrier()
    size = R
    while size > M:
        old = now + side * R
        new = now + (1 - side) * R
        evens = (size + 1) // 2
        odds = size // 2
        leave = tl.minimum(tl.minimum(MOST, size - M), evens)
        for e0 in range(0, evens, BE):
            e = e0 + tl.arange(0, BE)
            mine = tl.load(old + 2 * e, mask=e < evens, other=0)
            best = tl.full((BE,), float("-inf"), tl.float32)
            for o0 in range(0, odds, BO):
                o = o0 + tl.arange(0, BO)
                other = tl.load(old + 2 * o + 1, mask=o < odds, other=0)
                both = (e < evens)[:, None] & (o < odds)[None, :]
                part = tl.load(cosine + mine[:, None] * R + other[None, :], mask=both, other=float("-inf"))
                best = tl.maximum(best, tl.max(part, 1))
            tl.store(similar + e, best, mask=e < evens)
        tl.debug_barrier()  # read across threads from here on
        for e0 in range(0, evens, BE):
            e = e0 + tl.arange(0, BE)
            mine = tl.load(similar + e, mask=e < evens, other=0.0)
            rank = tl.zeros((BE,), tl.int32)
            for f0 in range(0, evens, BO):
                f = f0 + tl.arange(0, BO)
                other = tl.load(similar + f, mask=f < evens, other=float("-inf"))
                ahead = (other[None, :] > mine[:, None]) | (
                    (other[None, :] == mine[:, None]) & (f[None, :] < e[:, None])
                )
                rank += tl.sum((ahead & (f < evens)[None, :]).to(tl.int32), 1)
            stays = (e < evens) & (rank >= leave)
            tl.store(new + rank - leave, tl.load(old + 2 * e, mask=e < evens, other=0), mask=stays)
        for o0 in range(0, odds, BO):
            o = o0 + tl.arange(0, BO)
            tl.store(new + evens - leave + o, tl.load(old + 2 * o + 1, mask=o < odds, other=0), mask=o < odds)
        tl.debug_barrier()
        size -= leave
        side = 1 - side
    for i0 in range(0, M, BO):
        i = i0 + tl.arange(0, BO)
        at = tl.load(now + side * R + i, mask=i < M, other=0)
        tl.store(out + b * M + i, tl.load(order + b * sob + at * son, mask=i < M, other=0), mask=i < M)


def without_duplicates(x: Tensor, order: Tensor, count: int, most: int = 8) -> Tensor:
    """See `mustdrop.kernels.without_duplicates`."""
    batch, many = order.shape
    if many > MOST:
        return OPERATIONS["without_duplicates"].reference(x, order, count, most)  # type: ignore[no-any-return]
    out = order.new_empty(batch, count)
    if out.numel():
        place = order.new_empty(batch, 2, many, dtype=torch.int32)
        similar = x.new_empty(batch, many, dtype=torch.float32)
        _rounds[(batch,)](
            cosines(gather_rows([x], order)[0]), order, place, similar, out, many, count, most, *order.stride(),
            BE=8, BO=min(256, p2(many, 16)), num_warps=8, num_stages=1, **FUSED,
        )  # fmt: skip
    return out
