"""DivPrune against the matrix of distances written out, and on small cases worked out by hand."""

from __future__ import annotations

import pytest
import torch

from mustdrop.errors import UnknownKnobError
from mustdrop.kernels import reference_choices
from mustdrop.method import find
from mustdrop.methods.divprune import MaxMinDiversity
from mustdrop.pruners import Features
from mustdrop.rules.diversity import farthest_first


def directions(*degrees):
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)[None]


def written_out(x, count):
    """The paper's formula on the whole matrix, in float64."""
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    distance = 1 - x @ x.T
    picks = [int(distance.sort(0).values[1].argmax())]
    while len(picks) < count:
        nearest = distance[picks].amin(0)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    return picks


def test_each_pick_is_the_farthest_from_the_picks():
    x = directions(0.0, 10.0, 30.0, 90.0, 95.0)  # 30 is the loneliest, then 95 is 65 away from it, then 0 is 30
    assert farthest_first(x, 5).tolist() == [[2, 4, 0, 1, 3]]


@pytest.mark.parametrize("held", [0, 4096])
@pytest.mark.parametrize("block", [1, 5000, 1 << 24])
def test_it_is_the_formula_for_every_row_of_a_batch(held, block, monkeypatch):
    monkeypatch.setattr(reference_choices, "HELD", held)
    monkeypatch.setattr(reference_choices, "_BLOCK", block)
    x = torch.randn(3, 60, 7, generator=torch.Generator().manual_seed(0))
    assert farthest_first(x, 59).tolist() == [written_out(row, 59) for row in x]


@pytest.mark.parametrize("held", [0, 4096])
def test_duplicates_come_last_and_the_lower_index_first(held, monkeypatch):
    monkeypatch.setattr(reference_choices, "HELD", held)
    x = torch.eye(4)[[0, 0, 1, 1, 2, 2, 3]][None]
    assert farthest_first(x, 7).tolist() == [[6, 0, 2, 4, 1, 3, 5]]
    same = torch.ones(1, 5, 4)
    assert farthest_first(same, 5).tolist() == [[0, 1, 2, 3, 4]]
    assert farthest_first(torch.zeros(1, 3, 4), 3).tolist() == [[0, 1, 2]]


def test_lengths_do_not_matter():
    x = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(1))
    scale = torch.rand(2, 30, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    assert torch.equal(farthest_first(x, 9), farthest_first(x * scale, 9))


def test_the_rule_keeps_the_order_of_the_picture():
    seen = Features.of_grid(directions(0.0, 10.0, 30.0, 90.0, 95.0), (1, 5), {})
    assert MaxMinDiversity()(seen, 3).keep.tolist() == [[0, 2, 4]]
    assert not MaxMinDiversity().by_view


def test_it_has_no_other_knobs():
    with pytest.raises(UnknownKnobError, match="layer"):
        find("divprune", layer=3)
