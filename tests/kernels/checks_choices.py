"""What the kernels that choose tokens must do; see `checks`. Expected picks are computed one by one, in float64."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from kernels.checks import BFLOAT, CASES, FLOAT, HALF, case
from mustdrop import kernels
from mustdrop.kernels.reference_choices import NO_VOLUME
from mustdrop.kernels.triton import greedy

__all__ = ["CASES"]
INF = float("inf")


def features(device: str, batch: int, n: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Random ones, with a zero vector and, of every other layout, neighbours that lie apart."""
    x = torch.randn(batch, n, 2 * channels, device=device, dtype=dtype)[..., :channels]
    if n > 4:
        x[0, 1] = 0
    return x


def ragged(device: str, batch: int, n: int, count: int) -> tuple[Tensor, Tensor]:
    """Some candidates of each row, some picks of each row; the last row has fewer candidates than picks."""
    candidates = torch.rand(batch, n, device=device) < 0.6
    candidates[:, 0] = True
    candidates[-1] = torch.arange(n, device=device) % max(1, 2 * n // max(1, count)) == 0
    return candidates, torch.randint(0, count + 1, (batch,), device=device)


def cosines(x: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return unit @ unit.mT


def farthest(similar: Tensor, candidates: list[int], count: int) -> list[int]:
    picks: list[int] = []
    while len(picks) < min(count, len(candidates)):
        best, chosen = INF, -1
        for i in candidates:
            near = max((float(similar[i, j]) for j in (picks or candidates) if j != i), default=-INF)
            if i not in picks and (near < best or chosen < 0):
                best, chosen = near, i
        picks.append(chosen)
    return picks


def determinant(similar: Tensor, quality: Tensor, candidates: list[int], count: int) -> list[int]:
    picks: list[int] = []
    left, factor = similar.diagonal().clone(), []
    while len(picks) < min(count, len(candidates)):
        gain = torch.where(left > NO_VOLUME, quality.double() ** 2 * left, quality.double() - 1e9)
        chosen = max((i for i in candidates if i not in picks), key=lambda i: (float(gain[i]), -i))
        picks.append(chosen)
        row = similar[chosen] - sum((c[chosen] * c for c in factor), torch.zeros_like(left))
        rest = float(left[chosen])
        factor.append(row / rest**0.5 if rest > NO_VOLUME else torch.zeros_like(row))
        left = left - factor[-1] ** 2
    return picks


def coverage(similar: Tensor, weight: Tensor, candidates: list[int], count: int) -> list[int]:
    picks: list[int] = []
    covered = torch.zeros(similar.shape[0], dtype=torch.float64, device=similar.device)
    while len(picks) < min(count, len(candidates)):
        gain = (weight.double()[:, None] * (similar.double() - covered[:, None]).clamp(min=0)).sum(0)
        picks.append(max((i for i in candidates if i not in picks), key=lambda i: (float(gain[i]), -i)))
        covered = torch.maximum(covered, similar[:, picks[-1]].double())
    return picks


def padded(rows: list[list[int]], count: int) -> list[list[int]]:
    return [row[:count] + [-1] * (count - len(row[:count])) for row in rows]


SHAPES = (
    {"n": 2, "count": 1, "channels": 3, "dtype": FLOAT},
    {"n": 2, "count": 2, "channels": 16, "dtype": FLOAT},
    {"n": 63, "count": 5, "channels": 40, "dtype": BFLOAT},
    {"n": 130, "count": 4, "channels": 100, "dtype": HALF},
    {"n": 9, "count": 9, "channels": 64, "dtype": FLOAT},
    {"n": 30, "count": 0, "channels": 16, "dtype": FLOAT},
    {"n": 577, "count": 40, "channels": 64, "dtype": FLOAT, "slow": True},
)


@case(*SHAPES)
def check_farthest_first(device: str, n: int, count: int, channels: int, dtype: torch.dtype) -> None:
    x = features(device, 2, n, channels, dtype)
    candidates, counts = ragged(device, 2, n, count)
    similar, everyone = cosines(x), list(range(n))
    for given in (x, x.mT.contiguous().mT):
        expected = [farthest(row, everyone, count) for row in similar]
        assert kernels.farthest_first(given, count).tolist() == expected
    able = [row.nonzero()[:, 0].tolist() for row in candidates]
    expected = [farthest(*row, count) for row in zip(similar, able, strict=True)]
    assert kernels.farthest_first(x, count, candidates).tolist() == padded(expected, count)
    expected = [row[:wanted] for row, wanted in zip(expected, counts.tolist(), strict=True)]
    assert kernels.farthest_first(x, count, candidates, counts).tolist() == padded(expected, count)


def worthiest(
    similar: Tensor, weight: Tensor, bonus: Tensor, candidates: list[int], count: int, first: int | None
) -> list[int]:
    """`farthest`, with a factor and a number to add; one pick may be given."""
    picks: list[int] = [] if first is None else [first]
    while len(picks) < min(count, len(candidates)):
        best, chosen = -INF, -1
        for i in candidates:
            near = max((float(similar[i, j]) for j in (picks or candidates) if j != i), default=-INF)
            worth = float(weight[i]) * (1 - near) + float(bonus[i])
            if i not in picks and (worth > best or chosen < 0):
                best, chosen = worth, i
        picks.append(chosen)
    return picks[:count]


@case({"n": 2, "count": 2}, {"n": 40, "count": 12}, {"n": 577, "count": 40, "slow": True})
def check_farthest_first_with_weights(device: str, n: int, count: int) -> None:
    x = torch.randn(2, n, 16, device=device)
    weight, bonus = torch.rand(2, n, device=device), torch.rand(2, n, device=device)
    weight[:, 0] = 0
    candidates, _ = ragged(device, 2, n, count)
    candidates[:, :2] = True
    able, first = [row.nonzero()[:, 0].tolist() for row in candidates], torch.tensor([0, 1], device=device)
    for given, start in ((weight, None), (weight, first), (None, first)):
        each = torch.ones_like(bonus) if given is None else given
        expected = [
            worthiest(*row, able[b], count, None if start is None else int(start[b]))
            for b, row in enumerate(zip(cosines(x), each.double(), bonus.double(), strict=True))
        ]
        picks = kernels.farthest_first(x, count, candidates, None, given, bonus, start)
        assert picks.tolist() == padded(expected, count)


@case({"n": 3, "count": 2}, {"n": 20, "count": 9}, {"n": 577, "count": 40, "slow": True})
def check_greedy_coverage_with_quality(device: str, n: int, count: int) -> None:
    similar, quality = torch.randn(2, 17, n, device=device), torch.rand(2, n, device=device) + 0.01
    weight, candidates = torch.rand(2, 17, device=device), torch.rand(2, n, device=device) < 0.8
    expected = []
    for c, w, q, able in zip(similar.double(), weight.double(), quality.double(), candidates, strict=True):
        picks: list[int] = []
        covered = torch.zeros(17, dtype=torch.float64, device=device)
        while len(picks) < min(count, int(able.sum())):
            gain = q * (w[:, None] * (c - covered[:, None]).clamp(min=0)).sum(0)
            picks.append(
                max((i for i in able.nonzero()[:, 0].tolist() if i not in picks), key=lambda i: float(gain[i]))
            )
            covered = torch.maximum(covered, c[:, picks[-1]])
        expected.append(picks)
    assert kernels.greedy_coverage(similar, count, weight, candidates, None, quality).tolist() == padded(
        expected, count
    )


@case(*SHAPES)
def check_greedy_determinant(device: str, n: int, count: int, channels: int, dtype: torch.dtype) -> None:
    x, quality = features(device, 2, n, channels, dtype), torch.rand(2, n, device=device) + 0.05
    candidates, counts = ragged(device, 2, n, count)
    similar, everyone = cosines(x), list(range(n))
    expected = [determinant(*row, everyone, count) for row in zip(similar, quality, strict=True)]
    for given in (quality, quality.repeat_interleave(2, 1)[:, ::2]):
        assert kernels.greedy_determinant(x, given, count).tolist() == expected
    able = [row.nonzero()[:, 0].tolist() for row in candidates]
    expected = [determinant(*row, count)[:wanted] for *row, wanted in zip(similar, quality, able, counts.tolist(),
                strict=True)]  # fmt: skip
    assert kernels.greedy_determinant(x, quality, count, candidates, counts).tolist() == padded(expected, count)


@case({"tile": 16})
def check_choices_in_tiles(device: str, tile: int) -> None:
    """As where there are more candidates than a program looks at together; equals lie in several tiles."""
    x = torch.randn(2, 21, 16, device=device).repeat(1, 2, 1)
    quality = torch.rand(2, 21, device=device).repeat(1, 2) + 0.1
    candidates = torch.rand(2, 42, device=device) < 0.7
    chosen = []
    for size in (greedy.TILE, tile):
        with mock.patch.object(greedy, "TILE", size):
            chosen.append([kernels.farthest_first(x, 5), kernels.farthest_first(x, 3, candidates)])
            chosen[-1] += [kernels.greedy_determinant(x, quality, 5, candidates)]
    assert [picks.tolist() for picks in chosen[0]] == [picks.tolist() for picks in chosen[1]]


@case(
    {"many": 1, "n": 1, "count": 1, "dtype": FLOAT},
    {"many": 63, "n": 20, "count": 5, "dtype": FLOAT},
    {"many": 20, "n": 17, "count": 4, "dtype": BFLOAT},
    {"many": 70, "n": 8, "count": 8, "dtype": HALF},
    {"many": 9, "n": 30, "count": 0, "dtype": FLOAT},
    {"many": 577, "n": 577, "count": 40, "dtype": FLOAT, "slow": True},
)
def check_greedy_coverage(device: str, many: int, n: int, count: int, dtype: torch.dtype) -> None:
    similar = torch.randn(2, many, n, device=device, dtype=dtype)
    weight = torch.rand(2, many, device=device)
    weight[:, many // 2 :: 3] = 0
    candidates, counts = ragged(device, 2, n, count)
    everyone = list(range(n))
    for given in (None, weight):
        each = torch.ones_like(weight) if given is None else given
        expected = [coverage(*row, everyone, count) for row in zip(similar, each, strict=True)]
        for same in (similar,) if given is None else (similar.mT.contiguous().mT,):
            assert kernels.greedy_coverage(same, count, given).tolist() == expected
    able = [row.nonzero()[:, 0].tolist() for row in candidates]
    expected = [coverage(*row, count)[:wanted] for *row, wanted in zip(similar, weight, able, counts.tolist(),
                strict=True)]  # fmt: skip
    assert kernels.greedy_coverage(similar, count, weight, candidates, counts).tolist() == padded(expected, count)


@case()
def check_ties_of_choices_go_to_the_lower_index(device: str) -> None:
    """Arithmetic is exact here: unit vectors, halves and whole numbers."""
    x = torch.eye(4, device=device)[[0, 0, 1, 2, 1, 3, 3]][None]
    assert kernels.farthest_first(x, 7).tolist() == [[3, 0, 2, 5, 1, 4, 6]]
    assert kernels.farthest_first(torch.ones(1, 5, 16, device=device), 5).tolist() == [[0, 1, 2, 3, 4]]
    quality = torch.tensor([[0.5, 1.0, 0.5, 0.5, 0.5, 0.25, 0.5]], device=device)
    assert kernels.greedy_determinant(x, quality, 7).tolist() == [[1, 2, 3, 6, 0, 4, 5]]
    same = torch.ones(1, 6, 4, device=device)
    quality = torch.tensor([[0.1, 0.3, 0.3, 0.2, 0.5, 0.1]], device=device)
    assert kernels.greedy_determinant(same, quality, 6).tolist() == [[4, 1, 2, 3, 0, 5]]
    covering = (x @ x.mT).contiguous()
    assert kernels.greedy_coverage(covering, 7).tolist() == [[0, 2, 5, 3, 1, 4, 6]]
    score = torch.tensor([[1.0, 2, 2, 0, 2, -0.0, 0, 1]], device=device)
    alive = torch.ones_like(score, dtype=torch.bool)
    for wanted, stays in ((2, [1, 2]), (4, [0, 1, 2, 4]), (6, [0, 1, 2, 3, 4, 7]), (7, [0, 1, 2, 3, 4, 5, 7])):
        index, _ = kernels.select(score, alive, torch.tensor([wanted], device=device), wanted)
        assert index.tolist() == [stays]


def best(score: Tensor, alive: Tensor, wanted: int, protected: Tensor, importance: Tensor) -> list[int]:
    """One row of `select`, by sorting in words."""
    must = [i for i in range(len(score)) if alive[i] and protected[i]]
    rest = [i for i in range(len(score)) if alive[i] and not protected[i]]
    must.sort(key=lambda i: (-float(importance[i]), i))
    rest.sort(key=lambda i: (-float(score[i]), i))
    return sorted((must + rest)[: max(0, wanted)])


def in_front(rows: list[list[int]], slots: int) -> list[list[int]]:
    """Rows of indices behind as many -1 as they have fewer than `slots`."""
    return [[-1] * (slots - len(row)) + row for row in rows]


@case(
    *({"n": n, "slots": m, "coarse": c} for n, m, c in (
        (1, 1, False), (20, 20, True), (577, 64, False), (5, 0, False), (0, 0, False)))
)  # fmt: skip
def check_select(device: str, n: int, slots: int, coarse: bool) -> None:
    batch = 4
    score, importance = torch.randn(2, batch, n, device=device)
    if coarse:  # many ties
        score, importance = (2 * score).round() / 2, importance.round()
    alive = torch.rand(batch, n, device=device) < 0.8
    protected = torch.rand(batch, n, device=device) < 0.2
    wanted = torch.randint(0, slots + 1, (batch,), device=device)
    wanted[0] = slots
    if n > 6:
        protected[1] = True  # more than can stay
        score[2, :3] = torch.tensor([-INF, INF, -INF], device=device)
        alive[3] = False
    nobody = torch.zeros_like(alive)
    apart = score.repeat_interleave(2, 1)[:, ::2], alive.mT.contiguous().mT
    for guard, order in ((None, None), (protected, None), (protected, importance)):
        expected = [
            best(score[b], alive[b], int(wanted[b]), (nobody if guard is None else guard)[b],
                 (score if order is None else order)[b])
            for b in range(batch)
        ]  # fmt: skip
        for given in ((score, alive), apart)[: 1 if guard is None else 2]:
            index, stays = kernels.select(*given, wanted, slots, guard, order)
            assert [row.nonzero()[:, 0].tolist() for row in stays] == expected
            assert index.tolist() == in_front(expected, slots)
    others = ~alive & (torch.rand(batch, n, device=device) < 0.7)  # text stays besides
    expected = [sorted(row + others[b].nonzero()[:, 0].tolist()) for b, row in enumerate(expected)]
    most = max(map(len, expected), default=0)
    index, stays = kernels.select(score, alive, wanted, most, protected, importance, others=others)
    assert [row.nonzero()[:, 0].tolist() for row in stays] == expected
    assert index.tolist() == in_front(expected, most)
    expected = [sorted({*row, *(~alive[b]).nonzero()[:, 0].tolist()}) for b, row in enumerate(expected)]
    most = max(map(len, expected), default=0)
    index, stays = kernels.select(score, alive, wanted, most, protected, importance, rest=True)
    assert [row.nonzero()[:, 0].tolist() for row in stays] == expected
    assert index.tolist() == in_front(expected, most)


@case({"n": 130})
def check_select_by_statistics(device: str, n: int) -> None:
    statistics = torch.rand(2, 2, n, device=device) / torch.tensor([[1.0], [n / 3]], device=device)
    alive = torch.rand(2, n, device=device) < 0.7
    wanted = torch.tensor([n // 3, n // 5], device=device)
    total, peak = statistics.masked_fill(~alive[:, None], 0).double().unbind(1)
    score = torch.maximum(total / total.sum(1, keepdim=True) / 0.5, peak / 2.0)
    nobody = torch.zeros_like(alive)
    expected = [best(score[b], alive[b], int(wanted[b]), nobody[b], score[b]) for b in range(2)]
    index, _ = kernels.select(statistics, alive, wanted, n // 3, None, None, 0.5, 2.0)
    assert index.tolist() == in_front(expected, n // 3)
    index, stays = kernels.select(statistics, alive, wanted, 0, None, None, 0.5, 2.0)
    assert index.shape == (2, 0)
    assert [row.nonzero()[:, 0].tolist() for row in stays] == expected


def rounds(similar: Tensor, order: list[int], count: int, most: int) -> list[int]:
    """One row of `without_duplicates`, in words."""
    listed = list(range(len(order))) if count else []
    while len(listed) > count:
        even, odd = listed[::2], listed[1::2]
        near = {e: max(float(similar[order[e], order[o]]) for o in odd) for e in even}
        leave = min(most, len(listed) - count, len(even))
        listed = sorted(even, key=lambda e: -near[e])[leave:] + odd
    return [order[i] for i in listed]


@case(
    {"n": 20, "listed": 13, "count": 4, "most": 2},
    {"n": 80, "listed": 70, "count": 50, "most": 8},
    {"n": 9, "listed": 9, "count": 1, "most": 8},
    {"n": 9, "listed": 5, "count": 5, "most": 8},
    {"n": 9, "listed": 5, "count": 0, "most": 8},
)
def check_without_duplicates(device: str, n: int, listed: int, count: int, most: int) -> None:
    x = features(device, 2, n, 24, FLOAT)
    order = torch.rand(2, n, device=device).argsort(1)[:, :listed].repeat_interleave(2, 1)[:, ::2]
    expected = [rounds(s, o.tolist(), count, most) for s, o in zip(cosines(x), order, strict=True)]
    assert kernels.without_duplicates(x, order, count, most).tolist() == expected
