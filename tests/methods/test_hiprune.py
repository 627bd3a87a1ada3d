"""HiPrune on hand-made attention."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError
from mustdrop.method import find
from mustdrop.methods.hiprune import AnchorsBuffersRegisters
from mustdrop.pruners import Features, Read
from support.families import clone


def seen(rule, middle, deep, shape):
    return Features.of_grid(torch.zeros(*middle.shape, 2), shape, dict(zip(rule.reads, (middle, deep), strict=True)))


def attention(batch, n, *best):
    """(batch, n), the features `best` in falling order, all others zero."""
    out = torch.zeros(batch, n)
    for place, index in enumerate(best):
        out[:, index] = 1 - 0.01 * place
    return out


def test_an_anchor_brings_its_neighbours_and_registers_fill_up():
    rule = AnchorsBuffersRegisters(alpha=1.0)
    # 4 x 4; the anchor 5 has neighbours 1, 4, 6 and 9
    chosen = rule(seen(rule, attention(1, 16, 5), attention(1, 16, 5, 6, 15, 0), (4, 4)), 7)
    assert chosen.keep.tolist() == [[0, 1, 4, 5, 6, 9, 15]]
    assert chosen.merge_into is None
    assert chosen.blend is None


def test_neighbours_do_not_wrap_around_rows_or_frames():
    rule = AnchorsBuffersRegisters(alpha=1.0)
    # 3 is the end of the first row: beside it lie 2 and 7, not 4
    chosen = rule(seen(rule, attention(1, 16, 3), attention(1, 16, 12, 13, 14), (4, 4)), 5)
    assert chosen.keep.tolist() == [[2, 3, 7, 12, 13]]
    # the last feature of the first of two frames: the first of the second frame is not beside it
    chosen = rule(seen(rule, attention(1, 8, 3), attention(1, 8, 6, 7), (2, 2, 2)), 5)
    assert chosen.keep.tolist() == [[1, 2, 3, 6, 7]]


def test_overlapping_crosses_leave_room_for_registers_in_each_view():
    rule = AnchorsBuffersRegisters(alpha=1.0)
    middle = torch.cat([attention(1, 25, 12, 13), attention(1, 25, 6, 18)])
    deep = attention(2, 25, 24, 0, 23)
    chosen = rule(seen(rule, middle, deep, (5, 5)), 10)
    assert chosen.keep[0].tolist() == [0, 7, 8, 11, 12, 13, 14, 17, 18, 24]
    assert chosen.keep[1].tolist() == [1, 5, 6, 7, 11, 13, 17, 18, 19, 23]


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.77, 1.0])
def test_any_count_is_met(alpha):
    rule = AnchorsBuffersRegisters(alpha=alpha)
    middle, deep = torch.rand(2, 30), torch.rand(2, 30)
    for count in range(1, 31):
        keep = rule(seen(rule, middle, deep, (5, 6)), count).keep
        assert keep.shape == (2, count)
        assert torch.all(keep.diff(dim=1) > 0)
    if not alpha:
        assert keep.shape[1] == 30
        best = deep.topk(7).indices.sort(1).values
        assert torch.equal(rule(seen(rule, middle, deep, (5, 6)), 7).keep, best)


def test_ties_go_to_the_lower_index():
    rule = AnchorsBuffersRegisters()
    flat = torch.ones(1, 9)
    assert rule(seen(rule, flat, flat, (3, 3)), 4).keep.tolist() == [[0, 1, 2, 3]]


def test_it_reads_what_patches_receive_also_where_there_is_a_cls_token():
    rule = find("hiprune").vision.rule
    assert rule.reads == (Read(what="received", layer=8, of=23), Read(what="received", layer=22, of=23))
    assert [read.at(24, 22) for read in rule.reads] == [8, 22]
    # Qwen2.5-VL: 11 would see windows, and 7 and 15 are as near
    assert [read.at(32, 31, (7, 15, 23, 31)) for read in rule.reads] == [15, 31]
    assert [read.at(32, 31, (7, 15, 23, 31)) for read in find("vscan").vision.rule.reads] == [7, 31]


@pytest.mark.parametrize("knobs", [{"alpha": -0.1}, {"alpha": 1.1}, {"layer": 23}])
def test_knobs_are_checked(knobs):
    with pytest.raises(ConfigError):
        find("hiprune", **knobs)


@pytest.mark.parametrize(("family", "whole"), [("qwen2_5_vl", (1, 3)), ("exaone4_5", None), ("qwen2_vl", ())])
def test_windowed_encoders_are_read_where_they_see_the_whole_frame(family, whole):
    if not registry()[family].available():
        pytest.skip(f"this transformers has no {family}")
    model = mustdrop.patch(clone(family), "hiprune", keep=0.5)
    tower = registry()[family].tower(model)
    assert tower.whole == (tuple(model.model.visual.fullatt_block_indexes) if whole is None else whole)
    stage = vars(model)["_mustdrop"].encoders["image"]
    assert not tower.whole or set(stage.reads) <= set(tower.whole)
