"""Recipes that rank by the last token."""

from __future__ import annotations

import pytest
import torch

from mustdrop.errors import ConfigError
from mustdrop.method import find
from mustdrop.pruners import LastRow, PrefillPruner


def test_the_last_row_ranks_and_ties_go_to_the_lower_index():
    attention = torch.tensor([[[0.9, 0.1, 0.0, 0.0], [0.1, 0.3, 0.3, 0.3]]])
    kept = PrefillPruner(keep=2, score=LastRow())(attention, count=2)
    assert kept.keep.tolist() == [[1, 2]]


def test_fastv_filters_once_after_the_layer_before_k():
    prefill = find("fastv", layer=3, ratio=0.75).prefill
    assert prefill.filter_layers(32) == (2,)
    assert prefill.left(576) == (144,)
    assert find("fastv", compat="released").prefill.left(576) == (288,)


def test_pyramiddrop_has_the_papers_stages():
    prefill = find("pyramiddrop", ratios=(0.5, 0.25, 0.125)).prefill
    assert prefill.filter_layers(32) == (7, 15, 23)
    assert prefill.left(576) == (288, 144, 72)


@pytest.mark.parametrize(("name", "knob"), [("fastv", {"ratio": 0.5}), ("pyramiddrop", {"ratios": (0.5, 0.2, 0.1)})])
def test_a_budget_and_ratios_contradict(name, knob):
    with pytest.raises(ConfigError, match="leave one out"):
        find(name, keep=0.4, **knob)


def test_one_entry_per_filter():
    with pytest.raises(ConfigError, match="2 entries"):
        PrefillPruner(layers=(1, 3, 5), survivors=(9, 4)).filter_layers(8)
