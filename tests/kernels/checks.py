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
    sums = kernels.text_sums(q, k, place, visible, dim**-0.5, first=first)
    assert sums.shape[1] == next(parts for parts in range(16, 0, -1) if groups % parts == 0)
    each = zip(q.chunk(sums.shape[1], 1), k.chunk(sums.shape[1], 1), strict=True)
    parts = [probabilities(*pair, place, visible, dim**-0.5, first=first).sum(1) / sums.shape[1] for pair in each]
    close(sums, torch.stack(parts, 1), "probability", dtype)


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


@case(
    *(
        {"length": n, "dtype": t, "dim": d}
        for n, t, d in ((63, FLOAT, 16), (130, HALF, 72), (1, BFLOAT, 16), (300, FLOAT, 16))
    )
)
def check_received_attention(device: str, length: int, dtype: torch.dtype, dim: int) -> None:
    q, k = (torch.randn(2, 3, length, dim, device=device, dtype=dtype) for _ in range(2))
    visible = torch.rand(2, length, device=device) < 0.8
    visible[:, 0] = True
    rows = torch.arange(length, device=device).expand(2, -1)
    expected = probabilities(q, k, rows, visible[:, None].expand(-1, length, -1), 0.2)
    expected = (expected * visible[..., None]).sum(1) / visible.sum(1, keepdim=True)
    close(kernels.received_attention(q, k, visible, 0.2), expected, "probability", dtype)
