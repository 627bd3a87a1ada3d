"""Copies: rows of several tensors, a cut of a mask, and entries of all cache layers, in few launches.

Numbers are moved as integers of the same size, so a copy is exact and one compiled kernel serves all types of a size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mustdrop.kernels.triton.common import FUSED, broadcast, p2

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
AT_ONCE = 8  # tensors per launch of `gather_rows`: hidden states, and what is known of each row
PART = 1 << 28  # bytes of cache written per launch: old and new entries of that many exist side by side
LAYERS = 64  # tensors per launch of `compact`, whose addresses are its arguments


@triton.jit
def _move(x, out, index, M, width, sxb, sxn, block, there, i, b, BC: tl.constexpr, ZERO: tl.constexpr):
    """Rows `index` of one tensor: BC columns from `block` on."""
    c = block * BC + tl.arange(0, BC)
    inside = there[:, None] & (c < width)[None, :]
    row = tl.maximum(index, 0)
    v = tl.load(x + b * sxb + row[:, None] * sxn + c[None, :], mask=inside, other=0)
    if ZERO:
        v = tl.where((index < 0)[:, None], 0, v)
    tl.store(out + b * M * width + i[:, None].to(tl.int64) * width + c[None, :], v, mask=inside)


@triton.jit
def _gather(
    xs, outs, index, M, widths, sbs, sns, firsts, sib, sim, BR: tl.constexpr, BC: tl.constexpr, ZERO: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """BR rows x BC columns of one of several tensors; tensor t has the column blocks from firsts[t] on."""
    block = tl.program_id(2)
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    there = i < M
    j = tl.load(index + b * sib + i * sim, mask=there, other=0)
    for t in tl.static_range(COUNT):
        if (block >= firsts[t]) & (block < firsts[t + 1]):
            _move(xs[t], outs[t], j, M, widths[t], sbs[t], sns[t], block - firsts[t], there, i, b, BC, ZERO)


@triton.jit
def _cut(
    x, rows, columns, out, n, k, sxb, sxh, sxq, sxk, srb, srn, scb, sck, H, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """One tile of a mask."""
    b = (tl.program_id(2) // H).to(tl.int64)
    h = (tl.program_id(2) % H).to(tl.int64)
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    j = tl.program_id(1) * BC + tl.arange(0, BC)
    both = (i < n)[:, None] & (j < k)[None, :]
    row = tl.maximum(tl.load(rows + b * srb + i * srn, mask=i < n, other=0), 0)
    column = tl.maximum(tl.load(columns + b * scb + j * sck, mask=j < k, other=0), 0)
    v = tl.load(x + b * sxb + h * sxh + row[:, None] * sxq + column[None, :] * sxk, mask=both, other=0)
    tl.store(out + (tl.program_id(2).to(tl.int64) * n + i[:, None]) * k + j[None, :], v, mask=both)


@triton.jit
def _compact(
    xs, outs, index, widths, M, G, first, sxb, sxg, sxn, sil, sib, sim, D: tl.constexpr, BD: tl.constexpr,
    BR: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, PER: tl.constexpr,
):  # fmt: skip
    """BR entries of one head of one tensor: all layers in one launch, whose addresses are arguments.

    With PER, as many tensors belong to a layer, which has entries of its own; the first is of layer `first`.

    A table of addresses would have to be copied to the device, and neither may a capture hold such a copy nor would it
    be right when the capture is replayed.
    """
    which = tl.program_id(2)
    b = (tl.program_id(1) // G).to(tl.int64)
    g = (tl.program_id(1) % G).to(tl.int64)
    source = xs[0].to(tl.int64)
    target = outs[0].to(tl.int64)
    for t in tl.static_range(1, COUNT):
        source = tl.where(which == t, xs[t].to(tl.int64), source)
        target = tl.where(which == t, outs[t].to(tl.int64), target)
    x = source.to(xs[0].dtype)
    out = target.to(outs[0].dtype)
    if ALIGNED:  # the compiler cannot see it, and copies 16 bytes at a time only where it knows
        x = tl.multiple_of(x, 16)
        out = tl.multiple_of(out, 16)
    if PER:
        layer = first + which // PER
        index += layer.to(tl.int64) * sil
        M = tl.load(widths + layer).to(tl.int32)
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    there = i < M
    d = tl.arange(0, BD)
    inside = there[:, None] & (d < D)[None, :]
    j = tl.maximum(tl.load(index + b * sib + i * sim, mask=there, other=0), 0)
    v = tl.load(x + b * sxb + g * sxg + j[:, None] * sxn + d[None, :], mask=inside, other=0)
    start = out + tl.program_id(1).to(tl.int64) * M * D
    tl.store(start + i[:, None] * D + d[None, :], v, mask=inside)


def gather_rows(tensors: list[Tensor], index: Tensor, zero: bool = False) -> list[Tensor]:
    """See `mustdrop.kernels.gather_rows`."""
    outs = [x.new_empty(*index.shape, *x.shape[2:]) for x in tensors]
    if not index.numel():
        return outs
    pairs = [(_as_rows(x), out) for x, out in zip(tensors, outs, strict=True) if out.numel()]
    for start in range(0, len(pairs), AT_ONCE):
        some = pairs[start : start + AT_ONCE]
        _launch_gather([_integers(x) for x, _ in some], [_integers(out) for _, out in some], index, zero)
    return outs


def _launch_gather(xs: list[Tensor], outs: list[Tensor], index: Tensor, zero: bool) -> None:
    batch, m = index.shape
    index = index.to(xs[0].device)
    block = min(512, p2(max(x.shape[2] for x in xs), 16))
    blocks = [triton.cdiv(x.shape[2], block) for x in xs]
    firsts = tuple(sum(blocks[:t]) for t in range(len(xs) + 1))
    rows = max(4, 4096 // block)
    _gather[(triton.cdiv(m, rows), batch, firsts[-1])](
        tuple(xs), tuple(outs), index, m, tuple(x.shape[2] for x in xs),
        tuple(0 if x.shape[0] == 1 else x.stride(0) for x in xs), tuple(x.stride(1) for x in xs), firsts,
        *index.stride(), BR=rows, BC=block, ZERO=zero, COUNT=len(xs), num_warps=4, **FUSED,
    )  # fmt: skip


def cut_mask(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """See `mustdrop.kernels.cut_mask`."""
    batch, n = rows.shape
    heads, k = mask.shape[1], columns.shape[1]
    out = mask.new_empty(batch, heads, n, k)
    if out.numel():
        x, rows, columns = _integers(mask), rows.to(mask.device), columns.to(mask.device)
        block = min(128, p2(k, 16))
        _cut[(triton.cdiv(n, 32), triton.cdiv(k, block), batch * heads)](
            x, rows, columns, _integers(out), n, k, *broadcast(x), *rows.stride(), *columns.stride(), heads,
            BR=32, BC=block, num_warps=4, **FUSED,
        )  # fmt: skip
    return out


def compact(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    """See `mustdrop.kernels.compact`."""
    outs = [x.new_empty(index.shape[0], x.shape[1], index.shape[1], x.shape[3]) for x in tensors]
    sources = [_rowwise(x) for x in tensors]
    for group in _alike(sources, outs):
        for part in _parts(group, outs[group[0]].nbytes):
            _launch_compact([sources[t] for t in part], [outs[t] for t in part], index[None])
    return outs


def compact_each(tensors: list[Tensor], index: Tensor, widths: Tensor, slots: list[int]) -> list[Tensor]:
    """See `mustdrop.kernels.compact_each`."""
    per = len(tensors) // max(1, len(slots))
    outs = [x.new_empty(index.shape[1], x.shape[1], slots[t // per], x.shape[3]) for t, x in enumerate(tensors)]
    sources = [_rowwise(x) for x in tensors]
    widths = widths.contiguous()
    for group in _alike(sources, outs):
        for part in _parts(group, max(outs[t].nbytes for t in group), per):
            layers = [t // per for t in part]
            for some, share in _runs(part, layers, per):
                _launch_compact(
                    [sources[t] for t in some], [outs[t] for t in some], index, widths, some[0] // per, share
                )
    return outs


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _alike(sources: list[Tensor], outs: list[Tensor]) -> list[list[int]]:
    """Numbers of the tensors that one launch can copy."""
    alike: dict[object, list[int]] = {}
    for t, x in enumerate(sources):
        if outs[t].numel():
            alike.setdefault((x.shape, x.stride(), x.dtype, _aligned(x)), []).append(t)
    return list(alike.values())


def _runs(part: list[int], layers: list[int], per: int) -> Iterator[tuple[list[int], int]]:
    """Launches for tensors of some layers, and how many of each layer follow one another in them."""
    for share in (per, 1):
        if layers == [layers[0] + place // share for place in range(len(part))]:
            yield part, share
            return
    for t in part:
        yield [t], 1


def _parts(group: list[int], size: int, per: int = 1) -> Iterator[list[int]]:
    step = min(LAYERS, max(1, PART // size))
    step = max(1, step - step % per)
    for start in range(0, len(group), step):
        yield group[start : start + step]


def _launch_compact(
    xs: list[Tensor], outs: list[Tensor], index: Tensor, widths: Tensor | None = None, first: int = 0, per: int = 0
) -> None:
    x, index = xs[0], index.to(xs[0].device)
    _, batch, m = index.shape
    heads, dim = x.shape[1], x.shape[3]
    block = p2(dim, 16)
    rows = max(4, 4096 // block)
    count = p2(len(xs))  # few numbers of arguments, since each is compiled for; the spare ones are not read
    spare = count - len(xs)
    _compact[(triton.cdiv(m, rows), batch * heads, len(xs))](
        tuple(_integers(t) for t in xs + xs[:1] * spare), tuple(_integers(t) for t in outs + outs[:1] * spare), index,
        index if widths is None else widths, m, heads, first, 0 if x.shape[0] == 1 else x.stride(0), x.stride(1),
        x.stride(2), *index.stride(), D=dim, BD=block, BR=rows, ALIGNED=_aligned(x), COUNT=count, PER=per,
        num_warps=4, **FUSED,
    )  # fmt: skip


def _aligned(x: Tensor) -> bool:
    """Whether it starts at a multiple of 16 bytes; what torch allocates anew does."""
    return x.data_ptr() % 16 == 0


def _as_rows(x: Tensor) -> Tensor:
    """(B or 1, N, ...) as (B or 1, N, C) with neighbouring columns."""
    x = x.reshape(x.shape[0], x.shape[1], math.prod(x.shape[2:]))
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _integers(x: Tensor) -> Tensor:
    if x.is_complex():
        x = torch.view_as_real(x).flatten(-2)
    return x.view(INTEGERS[x.element_size()])
