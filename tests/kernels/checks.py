"""What every kernel must do, as plain functions of a device: pytest runs them, and a machine without pytest can too.

Expected values come from the definitions in float64, written out here and not from the library's own references. New
tensors are filled with NaN first, so that what a kernel leaves unwritten shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mustdrop import kernels

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
TYPES = (FLOAT, HALF, BFLOAT)
SIZES = (1, 63, 576, 577, 2880)

# The one table of tolerances: largest absolute error, and largest error relative to the largest value. Both sides start
# from the same rounded inputs, so a type only matters where a result is rounded to it.
TOLERANCE: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    "probability": dict.fromkeys(TYPES, (2e-6, 2e-5)),
    "cosine": dict.fromkeys(TYPES, (5e-6, 0.0)),
    "mean": {FLOAT: (1e-6, 2e-6), HALF: (1e-6, 2**-10), BFLOAT: (1e-6, 2**-7)},
}


@dataclass(frozen=True)
class Case:
    """One check: its name, what it calls with a device, and whether it takes long in the interpreter."""

    name: str
    call: Callable[[str], None]
    slow: bool = False


CASES: list[Case] = []


def case(*options: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a check once per set of options; `slow=True` among them marks what the interpreter takes long for."""

    def add(check: Callable[..., None]) -> Callable[..., None]:
        for given in options or ({},):
            slow = bool(given.get("slow"))
            rest = {name: value for name, value in given.items() if name != "slow"}
            label = ", ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in rest.items())

            def call(device: str, rest: dict[str, Any] = rest) -> None:
                torch.manual_seed(0)
                with poisoned():
                    check(device, **rest)

            CASES.append(Case(f"{check.__name__}[{label}]", call, slow))
        return check

    return add


made: list[Tensor] = []  # what was allocated inside `poisoned`


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Tensors that are not filled hold NaN, or the largest integer."""
    real, copy = Tensor.new_empty, Tensor.contiguous

    def contiguous(self: Tensor) -> Tensor:
        made.append(copy(self))
        return made[-1]

    def new_empty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = real(self, *args, **kwargs)
        if out.is_floating_point() or out.is_complex():
            out.fill_(float("nan"))
        elif out.dtype != torch.bool:
            out.fill_(torch.iinfo(out.dtype).max)
        made.append(out)
        return out

    made.clear()
    Tensor.new_empty, Tensor.contiguous = new_empty, contiguous
    try:
        yield
    finally:
        Tensor.new_empty, Tensor.contiguous = real, copy


def close(got: Tensor, expected: Tensor, what: str, dtype: torch.dtype) -> None:
    """Compare by the table."""
    absolute, relative = TOLERANCE[what][dtype]
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if not got.numel():
        return
    assert bool(torch.isfinite(got).all()), "not finite: something was not written"
    error = (got.double() - expected.double()).abs().max().item()
    allowed = absolute + relative * expected.abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


# -- attention --------------------------------------------------------------------------------------------------------


def probabilities(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    first: int = 0,
) -> Tensor:
    """The definition, in float64."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    picked = torch.stack([q[b][:, rows[b].clamp(min=0)] for b in range(len(q))])
    logits = picked @ k.mT * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.double()
    seen = visible[:, None] & (rows >= 0)[:, None, :, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0).mean(1)[..., first:]


def inputs(
    device: str, keys: int, dtype: torch.dtype, heads: int, groups: int, dim: int, rows: int, batch: int, layout: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random queries and keys; rows and visibility as `layout` says."""
    queries = keys if layout == "causal" else rows + 3
    make = {"device": device, "dtype": dtype}
    if layout == "strided":  # what attention modules pass: a transposed view; here also of every other token
        q = torch.randn(batch, 2 * queries, heads, dim, **make)[:, ::2].transpose(1, 2)
        k = torch.randn(batch, keys, groups, 2 * dim, **make)[..., :dim].transpose(1, 2)
    elif layout == "scattered":  # neighbours in the last dimension lie apart
        q = torch.randn(batch, heads, dim, queries, **make).mT
        k = torch.randn(batch, groups, dim, keys, **make).mT
    else:
        q, k = torch.randn(batch, heads, queries, dim, **make), torch.randn(batch, groups, keys, dim, **make)
    place = torch.randint(0, queries, (batch, rows), device=device).sort(1).values
    if layout == "causal":
        visible = torch.arange(keys, device=device) <= place[..., None]
        return 2 * q, 2 * k, place, visible
    visible = torch.rand(batch, rows, keys, device=device) < 0.7
    if rows > 2:
        place[0, 0] = -1  # padding of ragged rows
        visible[-1, -1] = False  # and a row that sees nothing
    if layout == "padded":
        visible[0, :, : keys // 3] = False
        k[0, :, : keys // 3] = torch.nan  # nothing of what is hidden may leak
        k = k.nan_to_num(1e4)
    return 2 * q, 2 * k, place, visible


@case(
    *({"keys": n, "dtype": FLOAT, "heads": 2, "groups": 1, "dim": 16, "rows": 3} for n in SIZES),
    *({"keys": 300, "dtype": t, "heads": 4, "groups": 1, "dim": 24, "rows": 9} for t in (HALF, BFLOAT)),
    *({"keys": 63, "dtype": BFLOAT, "heads": 3, "groups": 3, "dim": d, "rows": 3} for d in (40, 72, 80, 128, 256)),
    {"keys": 63, "dtype": FLOAT, "heads": 28, "groups": 4, "dim": 128, "rows": 3},
    {"keys": 63, "dtype": BFLOAT, "heads": 2, "groups": 2, "dim": 16, "rows": 0},
    {"keys": 130, "dtype": BFLOAT, "heads": 2, "groups": 1, "dim": 16, "rows": 70},
    *({"keys": 200, "dtype": BFLOAT, "heads": 4, "groups": 2, "dim": 16, "rows": 5, "layout": name}
      for name in ("causal", "strided", "scattered", "padded")),
    {"keys": 640, "dtype": BFLOAT, "heads": 32, "groups": 32, "dim": 128, "rows": 64, "layout": "causal", "slow": True},
)  # fmt: skip
def check_rows_and_statistics(
    device: str, keys: int, dtype: torch.dtype, heads: int, groups: int, dim: int, rows: int, layout: str = "ragged"
) -> None:
    q, k, place, visible = inputs(device, keys, dtype, heads, groups, dim, rows, 2, layout)
    expected = probabilities(q, k, place, visible, dim**-0.5)
    first = keys // 3
    statistics = kernels.text_statistics(q, k, place, visible, dim**-0.5, first=first)
    total = expected.sum(1)[:, first:]
    peak = expected.amax(1)[:, first:] if rows else torch.zeros_like(total)
    close(statistics, torch.stack([total, peak], 1), "probability", dtype)
    close(kernels.row_probabilities(q, k, place, visible, dim**-0.5), expected, "probability", dtype)


@case(
    *({"dtype": t, "softcap": c, "per_head": h} for t, c, h in
      ((FLOAT, 5.0, False), (BFLOAT, 50.0, True), (HALF, None, True), (BFLOAT, None, False)))
)  # fmt: skip
def check_bias_and_softcap(device: str, dtype: torch.dtype, softcap: float | None, per_head: bool) -> None:
    q, k, place, visible = inputs(device, 150, dtype, 4, 2, 32, 6, 2, "ragged")
    bias = torch.randn(1 if per_head else 2, 4 if per_head else 1, 6, 150, device=device, dtype=dtype)
    lowest = bias.masked_fill(~visible[:1, None] & ~visible[1:, None], torch.finfo(dtype).min)
    for added in (bias, lowest):
        expected = probabilities(q, k, place, visible, 0.3, added, softcap)
        close(kernels.row_probabilities(q, k, place, visible, 0.3, added, softcap), expected, "probability", dtype)
        one = probabilities(q, k, place[:, 1:2], visible[:, 1:2], 0.3, added[:, :, 1:2], softcap)
        got = kernels.row_probabilities(q, k, place[:, 1:2], visible[:, 1:2], 0.3, added[:, :, 1:2], softcap)
        close(got, one, "probability", dtype)


@case(*({"key_splits": s, "head_splits": h} for s, h in ((1, 1), (3, 1), (1, 4), (5, 3))))
def check_splits(device: str, key_splits: int, head_splits: int) -> None:
    from mustdrop.kernels.triton.attention import launch

    q, k, place, visible = inputs(device, 300, BFLOAT, 8, 4, 16, 5, 2, "ragged")
    expected = probabilities(q, k, place, visible, 0.25)
    got = launch(q, k, place, visible, 0.25, None, None, 0, True, key_splits, head_splits)
    close(got, expected, "probability", BFLOAT)
    got = launch(q, k, place, visible, 0.25, None, None, 0, False, key_splits, head_splits)
    close(got, torch.stack([expected.sum(1), expected.amax(1)], 1), "probability", BFLOAT)


@case(
    *({"keys": n, "dtype": BFLOAT, "heads": 2, "groups": 1, "dim": 16} for n in SIZES),
    {"keys": 577, "dtype": FLOAT, "heads": 28, "groups": 4, "dim": 128},
    {"keys": 577, "dtype": HALF, "heads": 32, "groups": 32, "dim": 24, "slow": True},
    {"keys": 300, "dtype": BFLOAT, "heads": 7, "groups": 1, "dim": 72, "layout": "strided"},
)
def check_key_scores(
    device: str, keys: int, dtype: torch.dtype, heads: int, groups: int, dim: int, layout: str = "ragged"
) -> None:
    q, k, _, visible = inputs(device, keys, dtype, heads, groups, dim, 4, 2, layout)
    visible[0, 1] = False
    only = torch.zeros(2, 1, dtype=torch.long, device=device)
    for row in (0, 1):
        expected = probabilities(q[:, :, 2:3], k, only, visible[:, row : row + 1], 0.2)[:, 0]
        close(kernels.key_scores(q[:, :, 2], k, visible[:, row], 0.2), expected, "probability", dtype)


@case(*({"length": n, "dtype": t, "dim": d} for n, t, d in ((63, FLOAT, 16), (130, HALF, 72), (1, BFLOAT, 16))))
def check_received_attention(device: str, length: int, dtype: torch.dtype, dim: int) -> None:
    q, k = (torch.randn(2, 3, length, dim, device=device, dtype=dtype) for _ in range(2))
    visible = torch.rand(2, length, device=device) < 0.8
    visible[:, 0] = True
    rows = torch.arange(length, device=device).expand(2, -1)
    expected = probabilities(q, k, rows, visible[:, None].expand(-1, length, -1), 0.2)
    expected = (expected * visible[..., None]).sum(1) / visible.sum(1, keepdim=True)
    close(kernels.received_attention(q, k, visible, 0.2), expected, "probability", dtype)


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
        (2880, 7, 16, BFLOAT, False), (10, 0, 16, FLOAT, False), (0, 3, 16, FLOAT, True), (20, 5, 1100, HALF, False))),
)  # fmt: skip
def check_merge_tokens(device: str, tokens: int, slots: int, channels: int, dtype: torch.dtype, weighted: bool) -> None:
    x = torch.randn(2, tokens, 2 * channels, device=device, dtype=dtype)[..., :channels]
    slot = torch.randint(-1, max(1, slots), (2, tokens), device=device)
    if not slots:
        slot.fill_(-1)
    weight = torch.rand(2, tokens, device=device) + 0.1 if weighted else None
    each = torch.ones(2, tokens, device=device).double() if weight is None else weight.double()
    member = (slot[:, None] == torch.arange(slots, device=device)[:, None]).double() * each[:, None]
    expected = member @ x.double() / member.sum(-1, keepdim=True).clamp(min=1e-9)
    close(kernels.merge_tokens(x, slot, slots, weight), expected, "mean", dtype)


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
