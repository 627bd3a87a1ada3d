"""Greedy choices: one program per row makes all picks of a row, so that a choice is one launch.

What a pick depends on is how near each candidate is to the picks, or what they leave of it; it lies in a scratch row
that stays in the first cache, in tiles of up to `TILE` candidates. Only one row of similarities is read per pick. They
are made before, in one more launch, by as many programs as there are tiles. Above `MOST` candidates their matrix would
be larger than it is worth, and each pick is work enough for the whole device: there the reference runs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mustdrop.kernels.operation import OPERATIONS
from mustdrop.kernels.triton.common import FUSED, TIGHT, p2, plain, precision

MOST = 16384  # candidates per row; the similarities of so many are 1 GiB
TILE = 4096  # candidates that a program looks at together
AT_ONCE = 16384  # similarities that it reads together


@triton.jit
def _cosines(
    x, out, N, C, sxb, sxn, BN: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """A tile of the cosines of all pairs. Lengths come from the same tiles, in float32."""
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    dots = tl.zeros((BN, BN), tl.float32)
    long_i = tl.zeros((BN,), tl.float32)
    long_j = tl.zeros((BN,), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        u = tl.load(x + b * sxb + i[:, None] * sxn + c[None, :], mask=(i < N)[:, None] & (c < C)[None, :], other=0.0)
        v = tl.load(x + b * sxb + j[:, None] * sxn + c[None, :], mask=(j < N)[:, None] & (c < C)[None, :], other=0.0)
        dots = tl.dot(u, tl.trans(v), dots, input_precision=PRECISION)
        long_i += tl.sum(u.to(tl.float32) * u.to(tl.float32), 1)
        long_j += tl.sum(v.to(tl.float32) * v.to(tl.float32), 1)
    scale_i = 1.0 / tl.maximum(tl.sqrt(long_i), 1e-12)
    scale_j = 1.0 / tl.maximum(tl.sqrt(long_j), 1e-12)
    inside = (i < N)[:, None] & (j < N)[None, :]
    tl.store(out + b * N * N + i[:, None] * N + j[None, :], dots * scale_i[:, None] * scale_j[None, :], mask=inside)


@triton.jit
def _able(candidates, b, n, N, CANDIDATES: tl.constexpr):
    """Which of the candidates `n` a row has."""
    able = n < N
    if CANDIDATES:
        able = able & (tl.load(candidates + b * N + n, mask=able, other=0) != 0)
    return able


@triton.jit
def _limit(candidates, counts, b, N, M, CANDIDATES: tl.constexpr, COUNTS: tl.constexpr, BN: tl.constexpr):
    """How many picks a row makes."""
    limit = M
    if CANDIDATES:
        able = tl.zeros((BN,), tl.int32)
        for n0 in range(0, N, BN):
            able += _able(candidates, b, n0 + tl.arange(0, BN), N, CANDIDATES).to(tl.int32)
        limit = tl.minimum(limit, tl.sum(able, 0))
    if COUNTS:
        limit = tl.minimum(limit, tl.load(counts + b).to(tl.int32))
    return limit


@triton.jit
def _higher(best, at, value, n0):
    """The highest so far and where, with those of one more tile; the first of equals."""
    top = tl.max(value, 0)
    found = n0 + tl.argmax(value, 0)
    return tl.maximum(best, top), tl.where(top > best, found, at)


@triton.jit
def _farness(far, weight, bonus, n, N, WEIGHT: tl.constexpr, BONUS: tl.constexpr):
    """What a pick is chosen by, from minus the cosine with the nearest one."""
    value = far
    if WEIGHT or BONUS:
        value = 1.0 + far
    if WEIGHT:
        value = value * tl.load(weight + n, mask=n < N, other=0.0)
    if BONUS:
        value = value + tl.load(bonus + n, mask=n < N, other=0.0)
    return tl.where(far == float("-inf"), float("-inf"), value)


@triton.jit
def _farthest(
    cosine, far, candidates, counts, weight, bonus, first, picks, N, M, CANDIDATES: tl.constexpr, COUNTS: tl.constexpr,
    WEIGHT: tl.constexpr, BONUS: tl.constexpr, FIRST: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """`far` is minus the cosine with the nearest pick, -inf for what cannot be picked."""
    b = tl.program_id(0).to(tl.int64)
    limit = _limit(candidates, counts, b, N, M, CANDIDATES, COUNTS, BN)
    cosine += b * N * N
    far += b * N
    weight += b * N
    bonus += b * N
    best = float("-inf")
    at = 0
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        able = _able(candidates, b, n, N, CANDIDATES)
        if not FIRST:  # the nearest of all others
            near = tl.full((BN,), float("-inf"), tl.float32)
            for i0 in range(0, N, BI):
                i = i0 + tl.arange(0, BI)
                both = _able(candidates, b, i, N, CANDIDATES)[:, None] & (n < N)[None, :] & (i[:, None] != n[None, :])
                part = tl.load(cosine + i[:, None] * N + n[None, :], mask=both, other=float("-inf"))
                near = tl.maximum(near, tl.max(part, 0))
            value = _farness(tl.where(able, -near, float("-inf")), weight, bonus, n, N, WEIGHT, BONUS)
            best, at = _higher(best, at, value, n0)
        tl.store(far + n, tl.where(able, float("inf"), float("-inf")), mask=n < N)
    if FIRST:
        at = tl.load(first + b).to(tl.int32)
    for s in range(M):
        pick = at
        tl.store(picks + b * M + s, tl.where(s < limit, pick, -1).to(tl.int64))
        tl.debug_barrier()
        best = float("-inf")
        at = 0
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            row = tl.load(cosine + pick * N + n, mask=n < N, other=0.0)
            left = tl.minimum(tl.load(far + n, mask=n < N, other=float("-inf")), -row)
            left = tl.where(n == pick, float("-inf"), left)
            tl.store(far + n, left, mask=n < N)
            best, at = _higher(best, at, _farness(left, weight, bonus, n, N, WEIGHT, BONUS), n0)


@triton.jit
def _gain(left, quality, highest, least):
    """What each candidate would multiply the determinant by; where that is 0, a number below 0: its turn comes last."""
    gain = tl.where(left > least, quality * quality * left, quality - highest - 1.0)
    return tl.where(left == float("-inf"), float("-inf"), gain)


@triton.jit
def _determinant(
    cosine, quality, left, factor, candidates, counts, picks, N, M, LEAST, CANDIDATES: tl.constexpr,
    COUNTS: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """`left` is what the picks leave of each candidate, -inf for what cannot be picked."""
    b = tl.program_id(0).to(tl.int64)
    limit = _limit(candidates, counts, b, N, M, CANDIDATES, COUNTS, BN)
    cosine += b * N * N
    quality += b * N
    left += b * N
    factor += b * M * N
    highest = float("-inf")
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        highest = tl.maximum(highest, tl.max(tl.load(quality + n, mask=n < N, other=float("-inf")), 0))
    best = float("-inf")
    at = 0
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        able = _able(candidates, b, n, N, CANDIDATES)
        whole = tl.where(able, tl.load(cosine + n * N + n, mask=able, other=0.0), float("-inf"))
        tl.store(left + n, whole, mask=n < N)
        best, at = _higher(best, at, _gain(whole, tl.load(quality + n, mask=able, other=0.0), highest, LEAST), n0)
    for s in range(M):
        pick = at
        tl.store(picks + b * M + s, tl.where(s < limit, pick, -1).to(tl.int64))
        tl.debug_barrier()  # a pick reads across threads what was stored for those before
        rest = tl.load(left + pick)
        scale = tl.where(rest > LEAST, 1.0 / tl.sqrt(tl.maximum(rest, LEAST)), 0.0)
        tl.debug_barrier()
        best = float("-inf")
        at = 0
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            row = tl.load(cosine + pick * N + n, mask=n < N, other=0.0)
            for t0 in range(0, s, BS):
                t = t0 + tl.arange(0, BS)
                own = tl.load(factor + t * N + pick, mask=t < s, other=0.0)
                both = (t < s)[:, None] & (n < N)[None, :]
                part = tl.load(factor + t[:, None] * N + n[None, :], mask=both, other=0.0)
                row -= tl.sum(own[:, None] * part, 0)
            row = row * scale
            tl.store(factor + s * N + n, row, mask=n < N)
            now = tl.load(left + n, mask=n < N, other=float("-inf")) - row * row
            now = tl.where(n == pick, float("-inf"), now)
            tl.store(left + n, now, mask=n < N)
            best, at = _higher(best, at, _gain(now, tl.load(quality + n, mask=n < N, other=0.0), highest, LEAST), n0)


@triton.jit
def _coverage(
    similarity, weight, quality, candidates, counts, picks, K, N, M, ssb, ssi, ssn, WEIGHT: tl.constexpr,
    QUALITY: tl.constexpr, CANDIDATES: tl.constexpr, COUNTS: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """All picks of a row.

    Gains only fall as picks are made, so what a candidate gained before bounds what it gains now: of the highest bound
    the gain is computed anew, until one stays the highest.
    """
    b = tl.program_id(0).to(tl.int64)
    limit = _limit(candidates, counts, b, N, M, CANDIDATES, COUNTS, BN)
    n = tl.arange(0, BN)
    real = _able(candidates, b, n, N, CANDIDATES)
    similarity += b * ssb
    bound = tl.zeros((BN,), tl.float32)
    for i0 in range(0, K, BT):
        t = i0 + tl.arange(0, BT)
        both = (t < K)[:, None] & (n < N)[None, :]
        part = tl.load(similarity + t[:, None] * ssi + n[None, :] * ssn, mask=both, other=0.0).to(tl.float32)
        part = tl.maximum(part, 0.0)
        if WEIGHT:
            part = part * tl.load(weight + b * K + t, mask=t < K, other=0.0)[:, None]
        bound += tl.sum(part, 0)
    if QUALITY:
        bound = bound * tl.load(quality + b * N + n, mask=n < N, other=0.0)
    bound = bound * 1.0001 + 1e-30  # it stays a bound when the same numbers are added in another order
    i = tl.arange(0, BI)
    w = tl.where(i < K, 1.0, 0.0)
    if WEIGHT:
        w = tl.load(weight + b * K + i, mask=i < K, other=0.0)
    covered = tl.zeros((BI,), tl.float32)
    for s in range(M):
        pick = tl.argmax(tl.where(real, bound, float("-inf")), 0)
        tries = 0
        while tries < N:
            column = tl.load(similarity + i * ssi + pick * ssn, mask=i < K, other=0.0).to(tl.float32)
            gain = tl.sum(w * tl.maximum(column - covered, 0.0), 0)
            if QUALITY:
                gain = gain * tl.load(quality + b * N + pick)
            bound = tl.where(n == pick, gain, bound)
            best = tl.argmax(tl.where(real, bound, float("-inf")), 0)
            tries = tl.where(best == pick, N, tries + 1)
            pick = best
        tl.store(picks + b * M + s, tl.where(s < limit, pick, -1).to(tl.int64))
        column = tl.load(similarity + i * ssi + pick * ssn, mask=i < K, other=0.0).to(tl.float32)
        covered = tl.maximum(covered, column)
        real = real & (n != pick)


def farthest_first(
    x: Tensor,
    count: int,
    candidates: Tensor | None = None,
    counts: Tensor | None = None,
    weight: Tensor | None = None,
    bonus: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """See `mustdrop.kernels.farthest_first`."""
    if x.shape[1] > MOST:
        reference = OPERATIONS["farthest_first"].reference
        return reference(x, count, candidates, counts, weight, bonus, first)  # type: ignore[no-any-return]
    picks = x.new_empty(x.shape[0], count, dtype=torch.long)
    if picks.numel():
        block, warps, rows = _shape(x.shape[1])
        far = x.new_empty(x.shape[:2], dtype=torch.float32)
        _farthest[(x.shape[0],)](
            cosines(x), far, *_given(picks, candidates, counts), _floats(far, weight), _floats(far, bonus),
            picks if first is None else first.to(x.device).contiguous(), picks, x.shape[1], count,
            CANDIDATES=candidates is not None, COUNTS=counts is not None, WEIGHT=weight is not None,
            BONUS=bonus is not None, FIRST=first is not None, BN=block, BI=rows, num_warps=warps, num_stages=1, **FUSED,
        )  # fmt: skip
    return picks


def greedy_determinant(
    x: Tensor, quality: Tensor, count: int, candidates: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """See `mustdrop.kernels.greedy_determinant`."""
    operation = OPERATIONS["greedy_determinant"]
    if x.shape[1] > MOST:
        return operation.reference(x, quality, count, candidates, counts)  # type: ignore[no-any-return]
    from mustdrop.kernels.reference_choices import NO_VOLUME

    picks = x.new_empty(x.shape[0], count, dtype=torch.long)
    if picks.numel():
        block, warps, rows = _shape(x.shape[1])
        factor = x.new_empty(x.shape[0], count, x.shape[1], dtype=torch.float32)
        left = x.new_empty(x.shape[:2], dtype=torch.float32)
        _determinant[(x.shape[0],)](
            cosines(x), quality.float().contiguous(), left, factor, *_given(picks, candidates, counts), picks,
            x.shape[1], count, NO_VOLUME, CANDIDATES=candidates is not None, COUNTS=counts is not None, BN=block,
            BS=max(1, rows // (4 if TIGHT else 2)), num_warps=warps, num_stages=1, **FUSED,
        )  # fmt: skip
    return picks


def greedy_coverage(
    similarity: Tensor,
    count: int,
    weight: Tensor | None = None,
    candidates: Tensor | None = None,
    counts: Tensor | None = None,
    quality: Tensor | None = None,
) -> Tensor:
    """See `mustdrop.kernels.greedy_coverage`."""
    batch, many, n = similarity.shape
    if max(many, n) > TILE:
        reference = OPERATIONS["greedy_coverage"].reference
        return reference(similarity, count, weight, candidates, counts, quality)  # type: ignore[no-any-return]
    picks = similarity.new_empty(batch, count, dtype=torch.long)
    if picks.numel():
        _, warps, rows = _shape(max(n, many))
        _coverage[(batch,)](
            similarity, _floats(similarity, weight), _floats(similarity, quality),
            *_given(picks, candidates, counts), picks, many, n, count, *similarity.stride(), WEIGHT=weight is not None,
            QUALITY=quality is not None, CANDIDATES=candidates is not None, COUNTS=counts is not None, BN=p2(n, 16),
            BI=p2(many, 16), BT=rows, num_warps=warps, num_stages=1, **FUSED,
        )  # fmt: skip
    return picks


def cosines(x: Tensor) -> Tensor:
    """(B, N, N) float32, of all pairs of the features (B, N, C) of a row."""
    x = plain(x)
    batch, n, channels = x.shape
    out = x.new_empty(batch, n, n, dtype=torch.float32)
    tile = 32 if x.dtype == torch.float32 else 64
    _cosines[(triton.cdiv(n, tile), triton.cdiv(n, tile), batch)](
        x, out, n, channels, *x.stride()[:2], BN=tile, BC=min(64, p2(channels, 16)), PRECISION=precision(x),
        num_warps=4, num_stages=3, **FUSED,
    )  # fmt: skip
    return out


def _floats(spare: Tensor, values: Tensor | None) -> Tensor:
    """The pointer of numbers that may be missing."""
    return spare if values is None else values.to(spare.device).float().contiguous()


def _given(spare: Tensor, candidates: Tensor | None, counts: Tensor | None) -> tuple[Any, Any]:
    """The pointers of what may be missing."""
    flags = spare if candidates is None else candidates.to(spare.device).contiguous().view(torch.uint8)
    return flags, spare if counts is None else counts.to(spare.device).contiguous()


def _shape(n: int) -> tuple[int, int, int]:
    """Candidates per tile, warps, and rows of similarities that a program reads together."""
    block = min(TILE, p2(n, 16))
    return block, min(8, max(4, block // 512)), min(16, max(1, AT_ONCE // block))
