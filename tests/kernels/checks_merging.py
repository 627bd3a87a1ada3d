"""What the kernels that merge in the layers of an encoder must do; see `checks`. Expected values come one by one."""

from __future__ import annotations

import itertools
from unittest import mock

import torch
from torch import Tensor

from kernels.checks import BFLOAT, CASES, FLOAT, HALF, case, close
from mustdrop import kernels
from mustdrop.kernels.triton import bipartite

__all__ = ["CASES"]


def joined(x: Tensor, number: int, protected: int) -> list[int]:
    """One row of `bipartite_slots`: (N, D) in float64."""
    n = len(x)
    number = max(0, min(number, (n - protected) // 2))
    if not number:
        return list(range(n))
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    sources, destinations = list(range(0, n, 2)), list(range(1, n, 2))
    cosine = (unit[sources] @ unit[destinations].T).tolist()
    best = [max(range(len(row)), key=lambda j: (row[j], -j)) for row in cosine]
    able = [i for i in range(len(sources)) if sources[i] >= protected]
    goes = sorted(able, key=lambda i: (-cosine[i][best[i]], i))[:number]
    stays = [i for i in range(len(sources)) if i not in goes]
    slot = [0] * n
    for place, i in enumerate(stays):
        slot[sources[i]] = place
    for i in goes:
        slot[sources[i]] = len(stays) + best[i]
    for j, token in enumerate(destinations):
        slot[token] = len(stays) + j
    return slot


@case(
    *({"n": n, "number": r, "protected": p, "heads": h, "channels": c, "dtype": t} for n, r, p, h, c, t in (
        (1, 1, 0, 1, 3, FLOAT), (2, 1, 0, 3, 16, FLOAT), (9, 4, 1, 2, 40, BFLOAT), (65, 20, 1, 4, 64, HALF),
        (64, 99, 0, 1, 72, FLOAT), (40, 0, 1, 2, 16, FLOAT), (33, 7, 0, 1, 300, FLOAT))),
    {"n": 577, "number": 190, "protected": 1, "heads": 4, "channels": 64, "dtype": BFLOAT, "slow": True},
)  # fmt: skip
def check_bipartite_slots(
    device: str, n: int, number: int, protected: int, heads: int, channels: int, dtype: torch.dtype
) -> None:
    keys = torch.randn(2, n, heads, 2 * channels, device=device, dtype=dtype)[..., :channels].transpose(1, 2)
    given = [keys[:, 0], keys[:, 0].mT.contiguous().mT] if heads == 1 else [keys]
    mean = keys.double().mean(1)
    for x in given:
        expected = [joined(row, number, protected) for row in mean]
        assert kernels.bipartite_slots(x, number, protected).tolist() == expected


@case({"n": 9, "heads": 2}, {"n": 40, "heads": 1})
def check_bipartite_slots_of_rows_that_differ(device: str, n: int, heads: int) -> None:
    keys = torch.randn(4, heads, n, 16, device=device)
    lengths = torch.tensor([n, n - 1, 5, 3], device=device)
    numbers = torch.tensor([2, n, 0, 1], device=device)
    x = keys if heads > 1 else keys[:, 0]
    expected = [
        joined(row[:length], number, 1) + [-1] * (n - length)
        for row, number, length in zip(keys.double().mean(1), numbers.tolist(), lengths.tolist(), strict=True)
    ]
    assert kernels.bipartite_slots(x, 0, 1, numbers, lengths).tolist() == expected


@case()
def check_ties_of_matches_go_to_the_lower_index(device: str) -> None:
    """Arithmetic is exact here. Of 70 destinations some are looked at together, and equals lie in several blocks."""
    x = torch.eye(4, device=device)[torch.arange(140) // 2 % 3 + 1][None]
    expected = [joined(x[0], 9, 1)]
    assert kernels.bipartite_slots(x, 9, 1).tolist() == expected
    wide = torch.nn.functional.pad(x, (0, 300))
    assert kernels.bipartite_slots(wide, 9, 1).tolist() == expected
    assert kernels.best_match(x[:, ::2], x[:, 1::2])[1].tolist() == [[i % 3 for i in range(70)]]


@case(
    *({"tokens": n, "slots": s, "channels": c, "dtype": t, "known": w} for n, s, c, t, w in (
        (1, 1, 3, FLOAT, False), (63, 20, 40, BFLOAT, True), (65, 64, 1100, HALF, True), (577, 7, 16, FLOAT, True),
        (10, 0, 16, FLOAT, False), (30, 40, 16, FLOAT, True))),
    {"tokens": 63, "slots": 20, "channels": 16, "dtype": FLOAT, "known": True, "scanned": 62},
)  # fmt: skip
def check_merge_sized(
    device: str, tokens: int, slots: int, channels: int, dtype: torch.dtype, known: bool, scanned: int | None = None
) -> None:
    """`scanned` stands in for the number of tokens above which slots do not look for their own."""
    x = torch.randn(2, tokens, 2 * channels, device=device, dtype=dtype)[..., :channels]
    slot = torch.randint(-1, max(1, slots), (2, tokens), device=device)
    if not slots:
        slot.fill_(-1)
    size = torch.randint(1, 9, (2, tokens), device=device).float() if known else None
    names = torch.stack([torch.randperm(900, device=device)[:tokens] for _ in range(2)]) if known else None
    each = torch.ones(2, tokens, device=device).double() if size is None else size.double()
    of = slot[:, None] == torch.arange(slots, device=device)[:, None]
    whole = (of.double() * each[:, None]).sum(-1)
    own = torch.arange(tokens, device=device).expand(2, -1) if names is None else names
    first = own[:, None].expand(-1, slots, -1).masked_fill(~of, 1000).amin(-1) if tokens else whole
    apart = slot.repeat_interleave(2, 1)[:, ::2]
    with mock.patch.object(bipartite, "SCANNED", scanned or bipartite.SCANNED):
        for given in (slot, apart):
            mean, sizes, bias, firsts = kernels.merge_sized(x, given, slots, size, names)
            close(mean, (of.double() * each[:, None]) @ x.double() / whole[..., None].clamp(min=1e-9), "mean", dtype)
            assert torch.equal(sizes.double(), whole)
            empty = whole == 0
            close(bias.masked_fill(empty, 0), whole.log().masked_fill(empty, 0), "mean", dtype)
            assert bool((bias[empty] == torch.finfo(dtype).min).all())
            assert bias.dtype == mean.dtype == dtype
            assert torch.equal(firsts, first.masked_fill(empty, 0).long())


@case({"moves": 1}, {"moves": 2}, {"moves": 24}, {"moves": 70})
def check_followed(device: str, moves: int) -> None:
    widths = [150 - 2 * i for i in range(moves + 1)]
    slots = [torch.randint(-1 if i % 5 == 0 else 0, m, (2, n), device=device)
             for i, (n, m) in enumerate(itertools.pairwise(widths))]  # fmt: skip
    expected = []
    for b in range(2):
        places = list(range(widths[0]))
        for slot in slots:
            places = [-1 if place < 0 else int(slot[b, place]) for place in places]
        expected.append(places)
    assert kernels.followed(slots).tolist() == expected
