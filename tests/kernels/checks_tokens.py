"""What the kernels that merge, match and copy tokens must do; see `checks`."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from kernels.checks import BFLOAT, CASES, FLOAT, HALF, case, close, made
from mustdrop import kernels
from mustdrop.kernels.triton import merging

__all__ = ["CASES"]

# -- windows, merging, matching ---------------------------------------------------------------------------------------


@case(
    *({"windows": w, "n": n, "channels": c, "dtype": t} for w, n, c, t in (
        (1, 2, 1, FLOAT), (16, 4, 40, BFLOAT), (8, 9, 1024, HALF), (16, 9, 100, FLOAT), (3, 18, 33, BFLOAT),
        (0, 4, 16, FLOAT), (2, 4, 8200, BFLOAT))),
)  # fmt: skip
def check_window_similarity(device: str, windows: int, n: int, channels: int, dtype: torch.dtype) -> None:
    tokens = windows * n + 5
    x = torch.randn(2, tokens, channels, device=device, dtype=dtype) + 0.5
    x[0, 1] = 0  # a zero vector has no direction: its cosine is 0
    index = torch.randperm(tokens, device=device)[: windows * n].view(windows, n)
    for given in (x, x.repeat(1, 1, 2)[..., :channels], x.mT.contiguous().mT):
        unit = torch.nn.functional.normalize(given.double(), dim=-1)[:, index]
        pairs = unit @ unit.mT
        expected = (pairs.sum((2, 3)) - pairs.diagonal(dim1=2, dim2=3).sum(-1)) / (n * (n - 1))
        close(kernels.window_similarity(given, index), expected, "cosine", dtype)


@case(
    *({"tokens": n, "slots": s, "channels": c, "dtype": t, "weighted": w} for n, s, c, t, w in (
        (1, 1, 3, FLOAT, False), (63, 20, 40, BFLOAT, True), (576, 100, 64, HALF, True), (577, 576, 16, FLOAT, False),
        (300, 7, 16, BFLOAT, False), (10, 0, 16, FLOAT, False), (0, 3, 16, FLOAT, True), (20, 5, 1100, HALF, False))),
    {"tokens": 2880, "slots": 7, "channels": 16, "dtype": BFLOAT, "weighted": False, "slow": True},
    {"tokens": 577, "slots": 100, "channels": 16, "dtype": FLOAT, "weighted": False, "compared": 576},
)  # fmt: skip
def check_merge_tokens(
    device: str, tokens: int, slots: int, channels: int, dtype: torch.dtype, weighted: bool, compared: int | None = None
) -> None:
    """`compared` stands in for the number of tokens above which they are sorted."""
    x = torch.randn(2, tokens, 2 * channels, device=device, dtype=dtype)[..., :channels]
    slot = torch.randint(-1, max(1, slots), (2, tokens), device=device)
    if not slots:
        slot.fill_(-1)
    weight = torch.rand(2, tokens, device=device) + 0.1 if weighted else None
    each = torch.ones(2, tokens, device=device).double() if weight is None else weight.double()
    member = (slot[:, None] == torch.arange(slots, device=device)[:, None]).double() * each[:, None]
    expected = member @ x.double() / member.sum(-1, keepdim=True).clamp(min=1e-9)
    # every other number of a wider tensor: the slots lie apart in memory
    apart = slot.repeat_interleave(2, 1)[:, ::2]
    with mock.patch.object(merging, "COMPARED", compared or merging.COMPARED):
        for given in (slot, apart):
            close(kernels.merge_tokens(x, given, slots, weight), expected, "mean", dtype)


@case(
    *({"a": a, "b": b, "channels": c, "dtype": t} for a, b, c, t in (
        (1, 1, 16, FLOAT), (63, 62, 40, BFLOAT), (289, 288, 64, HALF), (40, 577, 128, FLOAT), (100, 3, 200, BFLOAT),
        (0, 4, 16, FLOAT))),
    {"a": 1440, "b": 1440, "channels": 64, "dtype": BFLOAT, "slow": True},
)  # fmt: skip
def check_best_match(device: str, a: int, b: int, channels: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 2 * max(a, b), channels, device=device, dtype=dtype)
    x[0, 0] = 0
    source, to = x[:, 0::2][:, :a], x[:, 1::2][:, :b]
    unit = [torch.nn.functional.normalize(part.double(), dim=-1) for part in (source, to)]
    cosine = unit[0] @ unit[1].mT
    best, where = kernels.best_match(source, to)
    close(best, cosine.amax(-1), "cosine", dtype)
    # among near equals any will do: what was found must be as good as the best
    assert bool(((where >= 0) & (where < b)).all())
    close(cosine.gather(2, where[..., None])[..., 0], cosine.amax(-1), "cosine", dtype)


# -- copies -----------------------------------------------------------------------------------------------------------


def picked(x: Tensor, index: Tensor, zero: bool) -> Tensor:
    """The definition of `gather_rows`."""
    rows = []
    for b, row in enumerate(index):
        one = x[b if len(x) > 1 else 0][row.clamp(min=0)].clone()
        if zero:
            one[row < 0] = 0
        rows.append(one)
    return torch.stack(rows)


@case(*({"tokens": n, "kept": m} for n, m in ((1, 1), (63, 20), (576, 192), (577, 577), (2880, 64), (30, 0))))
def check_gather_rows(device: str, tokens: int, kept: int) -> None:
    index = torch.rand(2, tokens, device=device).argsort(1)[:, :kept].sort(1).values
    if kept > 2:
        index[1, :2] = -1
    hidden = torch.randn(2, tokens, 70, device=device, dtype=BFLOAT)
    tables = [torch.randn(1, tokens, 16, device=device) for _ in range(2)]
    place = torch.arange(tokens, device=device).expand(2, -1)
    odd = torch.randn(2, 16, tokens, device=device, dtype=HALF).mT
    sides = torch.randn(2, tokens, 3, 5, device=device)
    flags = torch.rand(2, tokens, device=device) < 0.5
    for zero in (False, True):
        given = [hidden, *tables, place, odd, hidden[:, :, ::2], flags, sides]
        for got, x in zip(kernels.gather_rows(given, index, zero), given, strict=True):
            assert torch.equal(got, picked(x, index, zero))
    complex_ = torch.randn(1, tokens, 6, device=device, dtype=torch.complex64)
    assert torch.equal(kernels.gather_rows([complex_], index)[0], picked(complex_, index, False))


@case(
    *(
        {"n": n, "k": k, "dtype": t}
        for n, k, t in ((7, 20, torch.bool), (63, 64, FLOAT), (1, 577, BFLOAT), (0, 5, HALF))
    )
)
def check_cut_mask(device: str, n: int, k: int, dtype: torch.dtype) -> None:
    for batch, heads in ((1, 1), (2, 3)):
        mask = (torch.randn(batch, heads, 80, 600, device=device) > 0).to(dtype)
        mask = mask.mT.contiguous().mT if heads > 1 else mask
        rows, columns = torch.randint(-1, 80, (2, n), device=device), torch.randint(-1, 600, (2, k), device=device)
        whole = mask.expand(2, -1, -1, -1)
        expected = torch.stack([whole[b][:, rows[b].clamp(min=0)][:, :, columns[b].clamp(min=0)] for b in range(2)])
        assert torch.equal(kernels.cut_mask(mask, rows, columns), expected)


@case(*({"dtype": t, "slots": n, "kept": m} for t, n, m in (
    (BFLOAT, 63, 20), (HALF, 577, 64), (FLOAT, 1, 1), (FLOAT, 2880, 30), (BFLOAT, 20, 0))))  # fmt: skip
def check_compact(device: str, dtype: torch.dtype, slots: int, kept: int) -> None:
    index = torch.rand(2, slots, device=device).argsort(1)[:, :kept].sort(1).values
    if kept > 2:
        index[0, 0] = -1
    make = {"device": device, "dtype": dtype}
    layers = [torch.randn(2, 3, slots, 16, **make) for _ in range(4)]
    layers += [torch.randn(2, 3, slots + 9, 16, **make)[:, :, :slots] for _ in range(2)]  # room for tokens to come
    layers += [torch.randn(2, slots, 1, 24, **make).transpose(1, 2), torch.randn(2, 3, 8, slots, **make).mT]
    layers += [torch.randn(1, 3, slots, 5, **make), torch.randn(2, 3, slots, 0, **make)]
    made.extend(layers)  # the kernel finds them by a table of addresses
    out = kernels.compact(layers, index)
    for got, x in zip(out, layers, strict=True):
        whole = x.expand(2, -1, -1, -1)
        expected = torch.stack([whole[b][:, index[b].clamp(min=0)] for b in range(2)])
        assert torch.equal(got, expected)
        assert got.untyped_storage().nbytes() == got.nbytes  # nothing of what was left out is kept alive


@case(*({"dtype": t, "slots": n, "widths": w} for t, n, w in (
    (BFLOAT, 63, (20, 3, 20)), (FLOAT, 130, (1, 70, 0)), (HALF, 9, (4,)))))  # fmt: skip
def check_compact_each(device: str, dtype: torch.dtype, slots: int, widths: tuple[int, ...]) -> None:
    most = max(widths)
    index = torch.rand(len(widths), 2, slots, device=device).argsort(2)[..., :most]
    index[0, 1, 0] = -1
    make = {"device": device, "dtype": dtype}
    for wide in (16, 24):  # keys and values of one size, or of two
        layers = []
        for _ in widths:
            layers += [torch.randn(2, 3, slots + 5, 16, **make)[:, :, :slots], torch.randn(2, 3, slots, wide, **make)]
        layers[-1] = torch.randn(2, 3, wide, slots, **make).mT  # of another layout than the others
        made.extend(layers)
        out = kernels.compact_each(layers, index, torch.tensor(widths, device=device), list(widths))
        for t, (got, x) in enumerate(zip(out, layers, strict=True)):
            own = index[t // 2, :, : widths[t // 2]].clamp(min=0)
            assert torch.equal(got, torch.stack([x[b][:, own[b]] for b in range(2)]))
            assert got.untyped_storage().nbytes() == got.nbytes
