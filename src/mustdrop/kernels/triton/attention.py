"""Text -> vision attention: head-mean probabilities of a few query rows, or their sum and maximum per key.

Two passes over the keys. `_lse` finds the log-sum-exp of every (query head, row); rows of all query heads that share
a key head lie in one tile, so grouped keys are read once. `_scores` recomputes the logits for one block of keys and all
rows: the mean over heads lives in registers and only what is asked for is written. Nothing of size heads x rows x keys
exists. Where there are few keys and many heads, the heads are split over programs and `_finish` adds their parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mustdrop.kernels.reference import head_parts
from mustdrop.kernels.triton.common import (
    FUSED,
    LOG2E,
    TIGHT,
    base2,
    broadcast,
    combined,
    cores,
    p2,
    plain,
    precision,
    roomy,
    scales,
    unit,
)
from mustdrop.kernels.triton.decode import key_scores

LOG2 = tl.constexpr(LOG2E)
PARTS = 1 << 24  # numbers that the parts of the heads may take together


@triton.jit
def _lse(
    q, k, rows, visible, bias, lse, scale, cap, R, K, sqb, sqh, sqs, skb, skh, skn, srb, srr, svb, svr, svk, sbb, sbh,
    sbr, sbk, GROUPS, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UNIT: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of BM (query head, row) pairs of one key head, over one split of the keys."""
    b = tl.program_id(2) // GROUPS
    group = tl.program_id(2) % GROUPS
    split = tl.program_id(1)
    pair = tl.program_id(0) * BM + tl.arange(0, BM)
    there = pair < G * R
    head = group * G + pair // R
    r = pair % R
    d = tl.arange(0, BD)
    row = tl.load(rows + b * srb + r * srr, mask=there, other=0)
    place = tl.maximum(row, 0).to(tl.int32)
    queries = tl.load(
        q + b.to(tl.int64) * sqb * UNIT + head[:, None] * sqh * UNIT + place[:, None] * sqs * UNIT + d[None, :],
        mask=there[:, None] & (d < D)[None, :],
        other=0.0,
    )
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    per = tl.cdiv(tl.cdiv(K, BN), tl.num_programs(1)) * BN
    start = split * per
    keys = k + b.to(tl.int64) * skb * UNIT + group.to(tl.int64) * skh * UNIT
    seen_by = visible + b.to(tl.int64) * svb + r[:, None] * svr
    added = bias + b.to(tl.int64) * sbb + head[:, None] * sbh + r[:, None] * sbr
    for n0 in range(start, tl.minimum(start + per, K), BN):
        n = n0 + tl.arange(0, BN)
        block = tl.load(
            keys + n[:, None] * skn * UNIT + d[None, :], mask=(n < K)[:, None] & (d < D)[None, :], other=0.0
        )
        both = there[:, None] & (n < K)[None, :]
        logits = base2(tl.dot(queries, tl.trans(block), input_precision=PRECISION), scale, cap, CAPPED)
        if BIASED:
            logits += tl.load(added + n[None, :] * sbk, mask=both, other=0.0).to(tl.float32) * LOG2
        seen = tl.load(seen_by + n[None, :] * svk, mask=both, other=0)
        logits = tl.where((seen != 0) & both, logits, float("-inf"))
        high = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(high == float("-inf"), 0.0, high)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        top = high
    found = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
    out = lse + ((split * tl.num_programs(2) + tl.program_id(2)).to(tl.int64) * G) * R
    tl.store(out + pair, tl.where(row < 0, float("-inf"), found), mask=there)  # padding sees nothing


@triton.jit
def _scores(
    q, k, rows, visible, bias, lse, out, scale, cap, R, K, first, splits, groups_per, sqb, sqh, sqs, skb, skh, skn,
    srb, srr, svb, svr, svk, sbb, sbh, sbr, sbk, GROUPS, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, UNIT: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, SUMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All rows x BN keys: the head mean over one split of the heads, as rows, their sum, or their sum and maximum."""
    part = tl.program_id(1)
    b = tl.program_id(2)
    batch = tl.num_programs(2)
    width = K - first
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    n = first + column
    inside = n < K
    d = tl.arange(0, BD)
    total = tl.zeros((BN,), tl.float32)
    peak = tl.zeros((BN,), tl.float32)
    low = part.to(tl.int64) * groups_per
    for t0 in range(0, R, BT):
        t = t0 + tl.arange(0, BT)
        real = t < R
        both = real[:, None] & inside[None, :]
        row = tl.load(rows + b * srb + t * srr, mask=real, other=0)
        place = tl.maximum(row, 0).to(tl.int32)
        seen = tl.load(visible + b.to(tl.int64) * svb + t[:, None] * svr + n[None, :] * svk, mask=both, other=0)
        mean = tl.zeros((BT, BN), tl.float32)
        keys = k + b.to(tl.int64) * skb * UNIT + low * skh * UNIT
        query = q + b.to(tl.int64) * sqb * UNIT + low * G * sqh * UNIT
        sums = lse + (b.to(tl.int64) * GROUPS + low) * G * R
        for group in range(part * groups_per, tl.minimum((part + 1) * groups_per, GROUPS)):
            block = tl.load(
                keys + n[:, None] * skn * UNIT + d[None, :],
                mask=inside[:, None] & (d < D)[None, :],
                other=0.0,
            )
            # a loop at run time: unrolled, every step would get shared memory of its own
            for g in tl.range(0, G, num_stages=STAGES):
                head = group * G + g
                queries = tl.load(
                    query + place[:, None] * sqs * UNIT + d[None, :],
                    mask=real[:, None] & (d < D)[None, :],
                    other=0.0,
                )
                whole = combined(sums + t, splits, batch.to(tl.int64) * GROUPS * G * R, real, BT)
                logits = base2(tl.dot(queries, tl.trans(block), input_precision=PRECISION), scale, cap, CAPPED)
                if BIASED:
                    logits += LOG2 * tl.load(
                        bias + b.to(tl.int64) * sbb + head * sbh + t[:, None] * sbr + n[None, :] * sbk,
                        mask=both, other=0.0,
                    ).to(tl.float32)  # fmt: skip
                mean += tl.exp2(tl.minimum(logits - whole[:, None], 0.0))  # what is hidden may be above the sum
                query += sqh * UNIT
                sums += R
            keys += skh * UNIT
        mean = tl.where((seen != 0) & both, mean / (GROUPS * G), 0.0)
        if ROWS:
            start = out + ((part * batch + b).to(tl.int64) * R) * width
            tl.store(start + t[:, None].to(tl.int64) * width + column[None, :], mean, mask=both)
        else:
            total += tl.sum(mean, 0)
            if not SUMS:
                peak = tl.maximum(peak, tl.max(mean, 0))
    if SUMS:
        tl.store(out + (b * tl.num_programs(1) + part).to(tl.int64) * width + column, total, mask=inside)
    elif not ROWS:
        tl.store(out + (2 * b).to(tl.int64) * width + column, total, mask=inside)
        tl.store(out + (2 * b + 1).to(tl.int64) * width + column, peak, mask=inside)


@triton.jit
def _finish(
    parts, out, R, width, splits, BS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Add the parts of the splits of the heads, all of them at once: one after the other, each load would wait."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = column < width
    b = tl.program_id(1)
    batch = tl.num_programs(1)
    total = tl.zeros((BN,), tl.float32)
    peak = tl.zeros((BN,), tl.float32)
    for t0 in range(0, R, BT):
        t = t0 + tl.arange(0, BT)
        both = (t < R)[:, None] & inside[None, :]
        s = tl.arange(0, BS)
        first = (s * batch + b).to(tl.int64) * R * width
        place = first[:, None, None] + t[None, :, None] * width + column[None, None, :]
        each = tl.load(parts + place, mask=(s < splits)[:, None, None] & both[None, :, :], other=0.0)
        mean = tl.sum(each, 0)
        if ROWS:
            start = out + b.to(tl.int64) * R * width
            tl.store(start + t[:, None].to(tl.int64) * width + column[None, :], mean, mask=both)
        else:
            total += tl.sum(mean, 0)
            peak = tl.maximum(peak, tl.max(mean, 0))
    if not ROWS:
        tl.store(out + (2 * b).to(tl.int64) * width + column, total, mask=inside)
        tl.store(out + (2 * b + 1).to(tl.int64) * width + column, peak, mask=inside)


def row_probabilities(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    first: int = 0,
) -> Tensor:
    """See `mustdrop.kernels.row_probabilities`."""
    if rows.shape[1] == 1:  # one query needs its keys only once
        place = rows.clamp(min=0)[:, :, None, None].expand(-1, q.shape[1], 1, q.shape[3])
        only = None if bias is None else bias[:, :, 0]
        scores = key_scores(q.gather(2, place)[:, :, 0], k, visible[:, 0] & (rows >= 0), scaling, only, softcap)
        return scores[:, None, first:].contiguous()
    return launch(q, k, rows, visible, scaling, bias, softcap, first, as_rows=True)


def text_statistics(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    first: int = 0,
) -> Tensor:
    """See `mustdrop.kernels.text_statistics`."""
    return launch(q, k, rows, visible, scaling, bias, softcap, first, as_rows=False)


def text_sums(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    first: int = 0,
) -> Tensor:
    """See `mustdrop.kernels.text_sums`."""
    return launch(q, k, rows, visible, scaling, bias, softcap, first, False, sums=True)


def received_attention(q: Tensor, k: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """See `mustdrop.kernels.received_attention`."""
    length = q.shape[2]
    rows = torch.arange(length, dtype=torch.long, device=q.device).expand(q.shape[0], -1).masked_fill(~visible, -1)
    seen = visible[:, None].expand(-1, length, -1)
    total = launch(q, k, rows, seen, scaling, None, None, 0, as_rows=False)[:, 0]
    return total / visible.sum(1, keepdim=True).clamp(min=1)


def launch(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None,
    softcap: float | None,
    first: int,
    as_rows: bool,
    key_splits: int | None = None,
    head_splits: int | None = None,
    sums: bool = False,
) -> Tensor:
    """Both passes.

    `key_splits` and `head_splits` say over how many programs keys and heads are split (default: by size); with `sums`,
    the splits of the heads are handed out as they are.
    """
    q, k = plain(q), plain(k)
    batch, heads, _, dim = q.shape
    groups, keys = k.shape[1], k.shape[2]
    count, width = rows.shape[1], keys - first
    parts_out = head_parts(groups) if sums else 2
    shape = (batch, count, width) if as_rows else (batch, parts_out, width)
    if not count or not width or not batch:
        return q.new_zeros(shape, dtype=torch.float32)
    seen = visible.view(torch.uint8)
    added = bias if bias is not None else q
    step = unit(q, k)
    strides = (
        *(n // step for n in q.stride()[:3]),
        *(n // step for n in k.stride()[:3]),
        *rows.stride(),
        *seen.stride(),
        *(broadcast(bias) if bias is not None else 4 * [0]),
    )
    scale, cap, capped = scales(scaling, softcap)
    per_group = heads // groups
    bd = p2(dim, 16)
    exact = q.dtype == torch.float32
    # smaller tiles where larger ones would spill registers; the sizes of the others were measured on an H200
    wide = exact or bd > 128 or bd != dim
    widest = bd * q.element_size() > 512 or (exact and bd > 64)
    small = 16 if widest else 32 if wide else 64
    bm = min(small, p2(per_group * count, 16))
    pair_blocks = triton.cdiv(per_group * count, bm)
    many = cores(q.device)
    want = 2 * many
    long = small if wide else 128
    if key_splits is None:
        key_splits = max(1, min(16, triton.cdiv(keys, 2 * long), want // (pair_blocks * batch * groups)))
    bn = 128 if not wide and roomy(q.device) and triton.cdiv(width, 128) * batch * groups >= 3 * many else small
    key_blocks = triton.cdiv(width, bn)
    if sums:
        head_splits = parts_out
    elif head_splits is None:
        # the parts are rows x keys in size: only where that is little, and so are the programs without them
        head_splits = max(1, min(groups, want // (key_blocks * batch), PARTS // (batch * count * width)))
    groups_per = triton.cdiv(groups, head_splits)
    head_splits = triton.cdiv(groups, groups_per)
    common = {
        "G": per_group, "D": dim, "BD": bd, "UNIT": step, "CAPPED": capped,
        "BIASED": bias is not None, "PRECISION": precision(q), "num_stages": 2, **FUSED,
    }  # fmt: skip
    lse = q.new_empty(key_splits, batch, heads, count, dtype=torch.float32)
    _lse[(pair_blocks, key_splits, batch * groups)](
        q, k, rows, seen, added, lse, scale, cap, count, keys, *strides, groups,
        BM=bm, BN=long, num_warps=4 if wide else 8, **common,
    )  # fmt: skip
    out = q.new_empty(shape, dtype=torch.float32)
    split = head_splits > 1 and not sums
    parts = q.new_empty(head_splits, batch, count, width, dtype=torch.float32) if split else out
    bt = min(16 if widest else small, p2(count, 16))
    crowded = (exact and bd > 64) or (TIGHT and (bd > 128 or (sums and not wide)))
    _scores[(key_blocks, head_splits, batch)](
        q, k, rows, seen, added, lse, parts, scale, cap, count, keys, first, key_splits, groups_per, *strides, groups,
        BT=bt, BN=bn, ROWS=as_rows or split, SUMS=sums, STAGES=2 if per_group > 1 else 1,
        num_warps=8 if crowded else 4, **common,
    )  # fmt: skip
    if split:
        bs, bn = p2(head_splits), 32 if triton.cdiv(width, 32) * batch >= many else 8
        _finish[(triton.cdiv(width, bn), batch)](
            parts, out, count, width, head_splits, BS=bs, BT=max(1, min(p2(count), 8192 // (bs * bn))), BN=bn,
            ROWS=as_rows, num_warps=4, **FUSED,
        )  # fmt: skip
    return out
