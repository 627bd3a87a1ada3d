"""VisionZip: dominant and contextual tokens by hand, and what stays at the published budgets."""

from __future__ import annotations

import pytest
import torch

from mustdrop.method import find
from mustdrop.methods.visionzip import DominantAndContextual
from mustdrop.pruners import Features

# Eight patches: 2 and 5 are looked at. Of the rest (0 1 3 4 6 7), 0 and 4 are the evenly spaced targets of two.
ATTENTION = torch.tensor([[0.01, 0.02, 0.40, 0.03, 0.04, 0.30, 0.05, 0.06]])
KEYS = torch.tensor([[[1.0, 0], [1, 0.1], [9, 9], [0, 1], [0.1, 1], [9, 9], [1, 0.3], [0, 2]]])
VALUES = torch.tensor([[[1.0], [2], [4], [8], [16], [32], [64], [128]]])


def seen(rule, rows=1):
    read = dict(zip(rule.reads, (ATTENTION.expand(rows, -1), KEYS.expand(rows, -1, -1)), strict=True))
    return Features.of_grid(VALUES.expand(rows, -1, -1), (2, 4), read)


def test_dominant_tokens_stay_and_the_others_join_the_target_that_their_keys_resemble():
    rule = DominantAndContextual(contextual=0.5)
    chosen = rule(seen(rule), 4)
    assert chosen.keep.tolist() == [[2, 5, 0, 4]]  # in raster order, then the contextual ones
    # 1 and 6 resemble 0, 3 and 7 resemble 4
    assert chosen.merge_into.tolist() == [[2, 2, 0, 3, 3, 1, 2, 3]]


def test_a_contextual_token_is_its_own_value_plus_the_mean_of_those_that_join_it():
    rule = DominantAndContextual(contextual=0.5)
    chosen = rule(seen(rule, rows=2), 4)
    made = [[4.0], [32.0], [1 + (2 + 64) / 2], [16 + (8 + 128) / 2]]
    assert chosen.blend(VALUES.expand(2, -1, -1)).tolist() == [made, made]


def test_a_target_that_nothing_joins_keeps_its_value():
    rule = DominantAndContextual(contextual=0.25)
    chosen = rule(seen(rule), 7)  # five dominant ones; 0 and 1 and 3 are left, two of them targets
    assert chosen.keep.tolist() == [[2, 4, 5, 6, 7, 0, 1]]
    assert chosen.merge_into[0, 3] in (5, 6)
    joined = int(chosen.merge_into[0, 3]) - 5
    expected = [[4.0], [16], [32], [64], [128], [1], [2]]
    expected[5 + joined] = [expected[5 + joined][0] + 8]
    assert chosen.blend(VALUES).tolist() == [expected]


def test_without_contextual_tokens_it_is_a_ranking():
    rule = DominantAndContextual(contextual=0)
    chosen = rule(seen(rule), 3)
    assert chosen.keep.tolist() == [[2, 5, 7]]
    assert chosen.merge_into is None
    assert chosen.blend is None


@pytest.mark.parametrize(("count", "contextual"), [(192, 30), (128, 20), (64, 10)])
def test_the_published_split(count, contextual):
    rule = find("visionzip").vision.rule
    draw = torch.Generator().manual_seed(0)
    attended, keys = torch.rand(1, 576, generator=draw), torch.randn(1, 576, 8, generator=draw)
    read = dict(zip(rule.reads, (attended, keys), strict=True))
    chosen = rule(Features.of_grid(torch.randn(1, 576, 4, generator=draw), (24, 24), read), count)
    assert chosen.keep.shape == (1, count)
    dominant = chosen.keep[0, : count - contextual]
    attention = attended[0]
    others = torch.ones(576, dtype=torch.bool)
    others[dominant] = False
    assert attention[dominant].min() > attention[others].max()
    assert torch.equal(chosen.merge_into[0, dominant], torch.arange(count - contextual))
    assert (chosen.merge_into >= 0).all()  # everything is part of something
