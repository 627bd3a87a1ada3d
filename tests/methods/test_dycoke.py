"""DyCoke's vision stage on frames made by hand."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError
from mustdrop.method import find
from mustdrop.methods.dycoke import TemporalPruning, earlier_features
from mustdrop.pruners import Features
from support.builders import answer
from support.families import batch, clone

ONE, CLOSE, FAR, OPPOSITE = [1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]


def frames(*rows):
    """Features of a video, each frame one row of cells."""
    return Features.of_grid(torch.tensor(rows).flatten(0, 1)[None], (len(rows), 1, len(rows[0])), {})


def test_three_of_four_frames_keep_what_changed():
    seen = frames(
        [ONE, ONE, ONE, ONE],
        [OPPOSITE, ONE, FAR, CLOSE],  # against frame 0: 0 and 2 changed most
        [CLOSE, FAR, ONE, OPPOSITE],  # against frame 0: 3 and 1
        [CLOSE, FAR, OPPOSITE, ONE],  # against frame 2: 2 and 3
    )
    keep = TemporalPruning()(seen, 10).keep[0].tolist()
    assert keep == [0, 1, 2, 3, 4, 6, 9, 11, 14, 15]


def test_a_frame_is_compared_with_the_one_that_lacks_its_lowest_digit():
    seen = frames(*[[ONE, FAR]] * 8)
    earlier = earlier_features(seen, seen.frame)
    assert (earlier[0, ::2] // 2).tolist() == [-1, 0, 0, 2, 0, 4, 4, 6]
    assert (earlier[0, 3::2] % 2).unique().tolist() == [1]


def test_the_released_rate():
    values = torch.randn(1, 8 * 196, 16, generator=torch.Generator().manual_seed(0))
    seen = Features.of_grid(values, (8, 14, 14), {})
    count = 2 * 196 + 6 * int(0.3 * 196)  # two whole frames, and 30 % of the others
    keep = TemporalPruning()(seen, count).keep[0]
    assert (keep // 196).bincount().tolist() == [196, 58, 58, 58, 196, 58, 58, 58]


@pytest.mark.parametrize(("count", "whole"), [(79, [0, 4, 8, 12]), (28, [0, 8]), (20, [0]), (11, [])])
def test_a_small_budget_has_fewer_whole_frames(count, whole):
    values = torch.randn(1, 16 * 8, 4, generator=torch.Generator().manual_seed(1))
    keep = TemporalPruning()(Features.of_grid(values, (16, 2, 4), {}), count).keep[0]
    size = (keep // 8).bincount(minlength=16)
    assert (size == 8).nonzero()[:, 0].tolist() == whole
    others = size[size != 8]
    assert others.max() - others.min() <= 1


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
def test_any_count_and_any_number_of_frames(length):
    values = torch.randn(2, length * 6, 4, generator=torch.Generator().manual_seed(2))
    seen = Features.of_grid(values, (length, 2, 3), {})
    for group in (2, 4, 16):
        for count in range(1, length * 6 + 1):
            keep = TemporalPruning(group=group)(seen, count).keep
            assert keep.shape == (2, count)
            assert torch.all(keep.diff(dim=1) > 0)


def test_an_image_is_thinned_evenly_and_its_grids_are_not_compared():
    values = torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(3))
    assert TemporalPruning()(Features.of_grid(values, (4, 6), {}), 12).keep[0].tolist() == list(range(0, 24, 2))
    two = Features.of_grid(values, (2, 3, 4), {})
    tiles = Features(values, two.frame, two.row, two.column, first=two.frame)
    assert TemporalPruning()(tiles, 12).keep[0].tolist() == list(range(0, 24, 2))
    assert TemporalPruning()(two, 14).keep[0, :12].tolist() == list(range(12))  # as frames of a video


def test_what_has_nothing_to_be_compared_with_counts_as_changed():
    seen = frames([ONE, ONE, ONE], [ONE, ONE, ONE])
    part = [0, 2, 3, 4, 5]  # cell 1 of frame 0 is missing
    seen = Features(*(x[:, part] for x in (seen.values, seen.frame, seen.row, seen.column)))
    assert TemporalPruning()(seen, 3).keep.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision", "llava_next"])
def test_the_budget_holds_in_a_model(family):
    adapter = registry()[family]
    kind = "video" if "video" in adapter.media else "image"
    for keep in (0.2, 0.6):
        model = mustdrop.patch(clone(family), "dycoke", keep=keep)
        answer(model, batch(adapter, model, ((kind,), (kind, "image"), ())), steps=2)
        trace = mustdrop.trace(model)
        assert trace.tokens[0].tolist() == [int(total * keep + 1e-6) for total in trace.total.tolist()]


@pytest.mark.parametrize("group", [0, 1, 3, 6])
def test_groups_are_powers_of_two(group):
    with pytest.raises(ConfigError, match="group"):
        find("dycoke", group=group)
