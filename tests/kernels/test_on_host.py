"""Operations in fewer steps for tensors of the host: what they give is what the references give, bit for bit."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mustdrop import kernels
from mustdrop.kernels.operation import OPERATIONS


def same(name, *args):
    """The results of both, compared."""
    known = OPERATIONS[name]
    expected, got = known.reference(*args), known.on_host(*args)
    expected, got = (x if isinstance(x, tuple) else (x,) for x in (expected, got))
    for one, other in zip(expected, got, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name, known in OPERATIONS.items() if known.on_host is not None])
def test_arguments_are_those_of_the_reference(name):
    known = OPERATIONS[name]
    assert inspect.signature(known.on_host).parameters == inspect.signature(known.reference).parameters


SCORES = {
    "plain": lambda x: x,
    "ties": lambda x: (x * 2).round(),
    "hidden": lambda x: x.masked_fill(x < -0.5, -torch.inf),
    "missing": lambda x: x.masked_fill(x > 1, torch.nan),
    "whole": lambda x: (x * 5).long(),
    "half": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("besides", ["nothing", "others", "rest"])
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (1, 64), (8, 33)])
def test_select(kind, besides, batch, n):
    generator = torch.Generator().manual_seed(n)
    alive = torch.rand(batch, n, generator=generator) < 0.7
    others = ~alive & (torch.rand(batch, n, generator=generator) < 0.5) if besides == "others" else None
    wanted = torch.randint(0, n + 1, (batch,), generator=generator)
    protected = torch.rand(batch, n, generator=generator) < 0.3
    importance = torch.randn(batch, n, generator=generator)
    score = SCORES[kind](torch.randn(batch, n, generator=generator))
    statistics = torch.rand(batch, 2, n, generator=generator)
    for given in (score, statistics):
        for pinned, weight in ((None, None), (protected, None), (protected, importance)):
            rest = (pinned, weight, 1.3, 0.7, others, besides == "rest")
            most = int(OPERATIONS["select"].reference(given, alive, wanted, 0, *rest)[1].sum(1).max())
            for slots in {0, most, min(n, most + 1)}:
                same("select", given, alive, wanted, slots, *rest)


@pytest.mark.parametrize(("batch", "n", "width"), [(1, 2, 4), (1, 65, 8), (8, 33, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices_and_merges(batch, n, width, dtype):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(batch, n, width, generator=generator).to(dtype)
    alike = x[:, torch.randint(0, n, (n,), generator=generator)]
    quality, count = torch.rand(batch, n, generator=generator) + 0.1, max(1, n // 3)
    candidates = torch.rand(batch, n, generator=generator) < 0.6
    counts = torch.randint(0, count + 1, (batch,), generator=generator)
    heads = torch.randn(batch, n, 2, width, generator=generator).to(dtype).transpose(1, 2)
    size = torch.randint(1, 9, (batch, n), generator=generator).float()
    names = torch.randint(0, 500, (batch, n), generator=generator)
    for one in (x, alike):
        for limits in ((None, None), (candidates, None), (candidates, counts)):
            same("greedy_determinant", one, quality, count, *limits)
            for weight, bonus in ((None, None), (quality, None), (quality, 1 - quality), (None, quality)):
                same("farthest_first", one, count, *limits, weight, bonus, None)
                same("farthest_first", one, count, *limits, weight, bonus, torch.full((batch,), n - 1))
        for number in (0, 1, n // 4, n):
            same("bipartite_slots", one, number, number % 2)
            same("bipartite_slots", heads, number, 1)
        slot = torch.randint(0, count, (batch, n), generator=generator)
        for gone in (slot, slot.masked_fill(~candidates, -1)):
            same("merge_sized", one, gone, count, None, None)
            same("merge_sized", one, gone, count, size, names)


class Heard(TorchDispatchMode):
    """Which operations torch was told of."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_whoever_looks_at_operations_sees_one():
    """Only where nobody does is the dispatcher passed by."""
    x = torch.eye(4)[None]
    plain = kernels.farthest_first(x, 2)
    with Heard() as heard:
        assert torch.equal(kernels.farthest_first(x, 2), plain)
    assert "mustdrop::farthest_first" in heard.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kernels.farthest_first(x, 2)
    assert any(event.key == "mustdrop::farthest_first" for event in profile.key_averages())
