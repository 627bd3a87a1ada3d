"""VisPruner and FasterVLM: rounds of removal against a list written out, and hand-made cases."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.errors import ConfigError
from mustdrop.kernels import reference_choices
from mustdrop.method import find
from mustdrop.methods.vispruner import ImportantAndDiverse
from mustdrop.pruners import Features
from mustdrop.rules.diversity import without_duplicates
from support.families import clone


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounds(x, listed, count, most=8):
    """The list of the paper's rounds, one view, in float64."""
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    listed = list(listed)
    while count and len(listed) > count:
        even, odd = listed[::2], listed[1::2]
        similar = (x[even] @ x[odd].T).amax(1).tolist()
        order = sorted(range(len(even)), key=lambda i: -similar[i])
        listed = [even[i] for i in order[min(most, len(listed) - count) :]] + odd
    return listed if count else []


def seen(values, attention, rule):
    return Features.of_grid(values, (1, values.shape[1]), dict.fromkeys(rule.reads, attention))


@pytest.mark.parametrize("held", [0, 4096])
@pytest.mark.parametrize("number", [2, 3, 30, 31])
def test_rounds_are_those_of_the_list_for_every_row_of_a_batch(held, number, monkeypatch):
    monkeypatch.setattr(reference_choices, "HELD", held)
    x = random(3, 40, 6)
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i)) for i in range(3)])[:, :number]
    for count in range(number + 1):
        expected = [rounds(*row, count) for row in zip(x, order.tolist(), strict=True)]
        assert without_duplicates(x, order, count).tolist() == expected


def test_a_duplicate_leaves_first():
    x = torch.eye(5)[[0, 1, 2, 3, 4, 2]][None]  # listed: 0 2 4 | 1 3 5, and 5 is a copy of 2
    assert without_duplicates(x, torch.arange(6)[None], 5).tolist() == [[0, 4, 1, 3, 5]]


def test_more_than_half_of_a_list_leaves_in_two_rounds():
    x = random(1, 10, 4)
    assert without_duplicates(x, torch.arange(10)[None], 1).shape == (1, 1)
    assert without_duplicates(x, torch.arange(10)[None], 10).tolist() == [list(range(10))]


@pytest.mark.parametrize(("important", "top"), [(0.0, 0), (0.25, 2), (0.5, 4), (0.75, 6), (1.0, 8)])
def test_the_important_share_is_the_most_attended(important, top):
    rule = ImportantAndDiverse(important=important)
    values, attention = random(2, 30, 6), torch.rand(2, 30, generator=torch.Generator().manual_seed(1))
    keep = rule(seen(values, attention, rule), 8).keep
    assert torch.equal(keep, keep.sort(1).values)
    ranked = attention.argsort(dim=1, descending=True)
    for row in range(2):
        expected = {*ranked[row, :top].tolist(), *rounds(values[row], ranked[row, top:].tolist(), 8 - top)}
        assert set(keep[row].tolist()) == expected


@pytest.mark.parametrize("important", [0, 0.3, 0.5, 1])
def test_every_count_is_met(important):
    rule = ImportantAndDiverse(important=important)
    values, attention = random(1, 25, 4), torch.rand(1, 25, generator=torch.Generator().manual_seed(1))
    for count in range(1, 26):
        assert rule(seen(values, attention, rule), count).keep.unique().numel() == count


def test_a_share_is_not_rounded_down_by_floating_point():
    rule = ImportantAndDiverse(important=0.29)
    attention = torch.zeros(1, 200)
    attention[0, :29] = 1  # alike, so that only attention protects them
    values = torch.ones(1, 200, 3)
    assert set(range(29)) <= set(rule(seen(values, attention, rule), 100).keep[0].tolist())


def test_fastervlm_is_the_most_attended_and_ties_go_to_the_lower_index():
    rule = find("fastervlm").vision.rule
    attention = torch.tensor([[0.1, 0.4, 0.4, 0.2, 0.4]])
    assert rule(seen(torch.ones(1, 5, 2), attention, rule), 2).keep.tolist() == [[1, 2]]


def test_knobs_are_checked():
    with pytest.raises(ConfigError, match="important"):
        mustdrop.patch(clone("llava"), "vispruner", important=1.5)
