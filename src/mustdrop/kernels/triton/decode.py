"""The score of a decode step: head-mean probability that one query gives to each key.

`_logits` reads every key once, writes the base-2 logits (a few per cent of the bytes of the keys) and the log-sum-exp
of its split; `_mean` reads them back, mostly from the cache of the device, and averages over all heads at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mustdrop.kernels.triton.common import (
    FUSED,
    LOG2E,
    base2,
    broadcast,
    combined,
    cores,
    p2,
    plain,
    precision,
    scales,
    unit,
)

LOG2 = tl.constexpr(LOG2E)


@triton.jit
def _logits(
    q, k, visible, bias, logits, lse, scale, cap, K, per, sqb, sqh, skb, skh, skn, svb, svk, sbb, sbh, sbk, GROUPS,
    G: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr,
    CAPPED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The query heads of one key head, over one split of the keys."""
    split = tl.program_id(0)
    b = tl.program_id(1) // GROUPS
    group = tl.program_id(1) % GROUPS
    g = tl.arange(0, BG)
    real = g < G
    head = group * G + g
    d = tl.arange(0, BD)
    queries = tl.load(
        q + b.to(tl.int64) * sqb * UNIT + head[:, None] * sqh * UNIT + d[None, :],
        mask=real[:, None] & (d < D)[None, :],
        other=0.0,
    )
    keys = k + b.to(tl.int64) * skb * UNIT + group.to(tl.int64) * skh * UNIT
    out = logits + tl.program_id(1).to(tl.int64) * G * K
    top = tl.full((BG,), float("-inf"), tl.float32)
    total = tl.zeros((BG,), tl.float32)
    for n0 in range(split * per, tl.minimum((split + 1) * per, K), BN):
        n = n0 + tl.arange(0, BN)
        inside = n < K
        both = real[:, None] & inside[None, :]
        block = tl.load(keys + n[:, None] * skn * UNIT + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        x = base2(tl.dot(queries, tl.trans(block), input_precision=PRECISION), scale, cap, CAPPED)
        if BIASED:
            x += LOG2 * tl.load(
                bias + b.to(tl.int64) * sbb + head[:, None] * sbh + n[None, :] * sbk, mask=both, other=0.0
            ).to(tl.float32)
        seen = tl.load(visible + b.to(tl.int64) * svb + n * svk, mask=inside, other=0)
        x = tl.where((seen != 0)[None, :] & both, x, float("-inf"))
        tl.store(out + g[:, None] * K + n[None, :], x, mask=both)
        high = tl.maximum(top, tl.max(x, 1))
        safe = tl.where(high == float("-inf"), 0.0, high)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(x - safe[:, None]), 1)
        top = high
    found = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(lse + (split * tl.num_programs(1) + tl.program_id(1)) * G + g, found, mask=real)


@triton.jit
def _mean(logits, lse, out, K, splits, HEADS: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr):
    """The mean over all heads for BN keys: one tile, since a loop over heads would wait for memory at every step."""
    b = tl.program_id(1)
    batch = tl.num_programs(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < K
    h = tl.arange(0, BH)
    real = h < HEADS
    whole = combined(lse + b * HEADS + h, splits, batch * HEADS, real, BH)
    x = tl.load(
        logits + b.to(tl.int64) * HEADS * K + h[:, None] * K + n[None, :],
        mask=real[:, None] & inside[None, :],
        other=float("-inf"),
    )
    tl.store(out + b.to(tl.int64) * K + n, tl.sum(tl.exp2(x - whole[:, None]), 0) / HEADS, mask=inside)


def key_scores(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    splits: int | None = None,
) -> Tensor:
    """See `mustdrop.kernels.key_scores`; `splits` says over how many programs the keys are split (default: by size)."""
    q, k = plain(q), plain(k)
    batch, heads, dim = q.shape
    groups, keys = k.shape[1], k.shape[2]
    out = q.new_empty(batch, keys, dtype=torch.float32)
    if not out.numel():
        return out
    bd = p2(dim, 16)
    size = bd * q.element_size()
    bn = 16 if size > 512 else 32 if size > 256 else 64
    blocks = triton.cdiv(keys, bn)
    per = triton.cdiv(blocks, max(1, min(64, blocks, splits or 2 * cores(q.device) // (batch * groups)))) * bn
    splits = triton.cdiv(keys, per)
    seen = visible.view(torch.uint8)
    added = bias if bias is not None else q
    extra = [0, 0, 0] if bias is None else broadcast(bias)
    step = unit(q, k)
    scale, cap, capped = scales(scaling, softcap)
    logits = q.new_empty(batch, heads, keys, dtype=torch.float32)
    lse = q.new_empty(splits, batch, heads, dtype=torch.float32)
    _logits[(splits, batch * groups)](
        q, k, seen, added, logits, lse, scale, cap, keys, per,
        *(n // step for n in (*q.stride()[:2], *k.stride()[:3])), *seen.stride(), *extra, groups,
        G=heads // groups, BG=p2(heads // groups, 16), D=dim, BD=bd, BN=bn, UNIT=step, CAPPED=capped,
        BIASED=bias is not None, PRECISION=precision(q), num_warps=4, num_stages=3, **FUSED,
    )  # fmt: skip
    bh = p2(heads)
    width = max(16, min(128, 4096 // bh))
    _mean[(triton.cdiv(keys, width), batch)](
        logits, lse, out, keys, splits, HEADS=heads, BH=bh, BN=width, num_warps=4, **FUSED
    )
    return out
