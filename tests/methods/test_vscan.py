"""VScan on hand-made attention, and its budget over two stages."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import Method, PrefillPruner, VisionStagePruner, budget
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError
from mustdrop.method import find
from mustdrop.methods.vscan import TwoScans
from mustdrop.pruners import Features
from mustdrop.rules.groups import rank_in_group, windows
from support.builders import answer
from support.families import batch, clone


def grid(rule, shallow, deep, values, shape):
    return Features.of_grid(values, shape, dict(zip(rule.reads, (shallow, deep), strict=True)))


def test_half_by_windows_half_by_the_picture_and_the_rest_joins():
    rule = TwoScans(window=2)
    # windows: features 0 1 4 5 | 2 3 6 7
    shallow = torch.tensor([[0.1, 0.2, 0.5, 0.0, 0.0, 0.9, 0.8, 0.0]])
    deep = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.5]])
    values = torch.tensor([[[1.0, 0], [0, 1], [0, 1], [0, 1], [1, 0], [5, 5], [0, 3], [-1, 1]]])
    chosen = rule(grid(rule, shallow, deep, values, (2, 4)), 4)
    # 5 and 6 are their windows' best; of the others 0 and 7 lead by the deep layer
    assert chosen.keep.tolist() == [[0, 5, 6, 7]]
    assert chosen.merge_into.tolist() == [[0, 2, 2, 2, 0, 1, 2, 3]]
    assert chosen.blend(values).tolist() == [[[1, 0], [5, 5], [0, 1.5], [-1, 1]]]


def test_what_windows_cannot_share_goes_to_the_strongest_candidates():
    rule = TwoScans(window=2, local=1.0)
    shallow = torch.tensor([[0.4, 0.1, 0.9, 0.8, 0.3, 0.2, 0.7, 0.6]])
    seen = grid(rule, shallow, shallow, torch.randn(1, 8, 3), (2, 4))
    assert rule(seen, 1).keep.tolist() == [[2]]
    assert rule(seen, 2).keep.tolist() == [[0, 2]]
    assert rule(seen, 3).keep.tolist() == [[0, 2, 3]]


@pytest.mark.parametrize("count", range(1, 36))
def test_any_count_is_met_and_every_view_gets_what_it_gets_alone(count):
    rule = TwoScans(window=4)
    shallow, deep = torch.rand(3, 35), torch.rand(3, 35)
    values = torch.randn(3, 35, 4)
    chosen = rule(grid(rule, shallow, deep, values, (5, 7)), count)
    assert chosen.keep.shape == (3, count)
    assert torch.all(chosen.keep.diff(dim=1) > 0)
    for i in range(3):
        alone = rule(grid(rule, shallow[i : i + 1], deep[i : i + 1], values[i : i + 1], (5, 7)), count)
        assert torch.equal(alone.keep[0], chosen.keep[i])


def test_windows_stay_in_their_frame_and_ranks_in_their_window():
    frame = torch.tensor([[0, 0, 0, 1, 1, 1]])
    row, column = torch.zeros(1, 6, dtype=torch.long), torch.tensor([[0, 1, 2, 0, 1, 2]])
    window = windows(frame, row, column, 2)
    assert window.tolist() == [[0, 0, 1, 2, 2, 3]]
    score = torch.tensor([[0.5, 0.5, 0.1, 0.1, 0.2, 0.3]])
    assert rank_in_group(score, window).tolist() == [[0, 1, 0, 1, 0, 0]]


@pytest.mark.parametrize(("tokens", "entering", "left"), [(64, 96, 32), (128, 192, 64), (192, 288, 96)])
def test_the_papers_split(tokens, entering, left):
    method = find("vscan", keep=tokens)
    layers = method.prefill.filter_layers(32)
    assert layers == (15,)
    assert method.prefill.filter_layers(28) == (13,)  # the authors' layer for Qwen2.5-VL, where 14 is the first after
    assert budget.entry(576, 32, layers, tokens, method.vision.taper) == entering
    assert budget.spread(entering, 32, layers, tokens) == (left,)


@pytest.mark.parametrize("total", [1, 5, 36, 577])
@pytest.mark.parametrize("depth", [2, 5, 28, 40])
def test_the_split_meets_every_budget(total, depth):
    method = find("vscan")
    layers = method.prefill.filter_layers(depth)
    for tokens in {1, total // 3 + 1, total // 2 + 1, total}:
        entering = budget.entry(total, depth, layers, tokens, method.vision.taper)
        left = budget.spread(entering, depth, layers, tokens)[0]
        before = budget.spans(depth, layers)[0]
        mean = (before * entering + (depth - before) * left) / depth
        assert tokens - 1 < mean <= tokens
        assert entering == total or left >= entering / 3 - 1e-6


def test_both_stages_drop_in_a_model():
    model = mustdrop.patch(clone("llava"), "vscan", keep=10)
    answer(model, batch(registry()["llava"], model, (("image",), ("image", "image"), ())), steps=2)
    trace = mustdrop.trace(model)
    depth, layers = len(trace.tokens), find("vscan").prefill.filter_layers(len(trace.tokens))
    for row in (0, 1):
        entering = budget.entry(int(trace.total[row]), depth, layers, 10, 1 / 3)
        assert trace.tokens[0, row] == entering
        assert trace.tokens[-1, row] == budget.spread(entering, depth, layers, 10)[0]
    assert trace.tokens[:, 2].tolist() == [0] * depth


def test_a_taper_needs_a_budget_to_split():
    with pytest.raises(ConfigError, match='needs keep="auto"'):
        VisionStagePruner(keep=0.5, taper=0.5)
    with pytest.raises(ConfigError, match="there is none"):
        Method(vision=VisionStagePruner(taper=0.5))
    with pytest.raises(ConfigError, match="there is none"):
        Method(vision=VisionStagePruner(taper=0.5), prefill=PrefillPruner(scale=1.0))


@pytest.mark.parametrize("knobs", [{"window": 0}, {"local": 1.5}, {"layer": 23}, {"taper": 0}])
def test_knobs_are_checked(knobs):
    with pytest.raises(ConfigError):
        find("vscan", **knobs)
