"""Average pooling: exact for every count, plain pooling where sides divide."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

import mustdrop
from mustdrop.adapters import registry
from mustdrop.errors import BudgetError
from mustdrop.methods.pooling import AveragePooling
from mustdrop.pruners import Features
from mustdrop.rules.cells import centres, square_cells
from support.builders import answer
from support.families import batch, clone


def raster(*grid):
    frames, rows, columns = (1, *grid)[-3:]
    return torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).T


@pytest.mark.parametrize(
    ("grid", "pooled"),
    [((24, 24), (12, 12)), ((24, 24), (8, 8)), ((12, 24), (4, 8)), ((27, 9), (9, 3)), ((4, 4), (1, 1))],
)
def test_where_the_sides_divide_it_is_plain_pooling(grid, pooled):
    values = torch.randn(2, grid[0] * grid[1], 5)
    chosen = AveragePooling()(Features.of_grid(values, grid, {}), pooled[0] * pooled[1])
    expected = adaptive_avg_pool2d(values.mT.unflatten(2, grid), pooled).flatten(2).mT
    torch.testing.assert_close(chosen.blend(values), expected)


@pytest.mark.parametrize("grid", [(5, 7), (1, 13), (13, 1), (3, 4, 5), (7, 2, 2)])
def test_any_count_cuts_any_grid_into_cells_that_are_not_empty_and_about_equal(grid):
    place = raster(*grid)
    n = place.shape[1]
    for count in range(1, n + 1):
        sizes = torch.bincount(square_cells(place, count), minlength=count)
        assert len(sizes) == count
        assert sizes.min() >= 1
        assert sizes.max() <= 3 * n / count + 1
    assert square_cells(place, n).unique().numel() == n


@pytest.mark.parametrize("grid", [(24, 24), (18, 30)])
def test_cells_are_about_square(grid):
    place = raster(*grid)
    for count in (20, 35, 64, 100, 144, 192):
        cell = square_cells(place, count)
        spread = torch.stack([place[1:, cell == c].amax(1) - place[1:, cell == c].amin(1) + 1 for c in range(count)])
        side = (place.shape[1] / count) ** 0.5
        assert spread.max() <= 2 * side + 2


def test_grids_with_holes_are_cut_too():
    place = raster(6, 6)[:, torch.tensor([0, 3, 4, 7, 9, 11, 20, 21, 22, 23, 30, 35])]
    for count in range(1, 13):
        assert torch.bincount(square_cells(place, count), minlength=count).min() >= 1
    assert square_cells(place, 12).unique().numel() == 12


def test_frames_share_a_cell_only_where_there_are_fewer_cells_than_frames():
    place = raster(4, 3, 3)
    cell = square_cells(place, 7)
    assert all(place[0, cell == c].unique().numel() == 1 for c in range(7))
    assert square_cells(place, 2).tolist() == [0] * 18 + [1] * 18


def test_the_patch_in_the_middle_names_a_cell():
    place = raster(6, 6)
    assert centres(place, square_cells(place, 4)).tolist() == [7, 10, 25, 28]
    assert centres(raster(2, 2), torch.zeros(4, dtype=torch.long)).tolist() == [0]  # all are as near
    assert centres(raster(1, 4), torch.tensor([0, 0, 0, 1])).tolist() == [1, 3]


def test_a_video_pooled_to_fewer_tokens_than_frames_loses_none():
    values = torch.randn(1, 36, 3)
    chosen = AveragePooling()(Features.of_grid(values, (4, 3, 3), {}), 2)
    torch.testing.assert_close(chosen.blend(values)[0], values.view(2, 18, 3).mean(1))
    assert chosen.merge_into.min() >= 0


def test_media_of_different_shapes_share_a_batch():
    wide, tall = raster(2, 6), raster(6, 2)
    place = torch.stack([wide, tall])
    seen = Features(torch.randn(2, 12, 3), *place.unbind(1))
    chosen = AveragePooling()(seen, 3)
    assert chosen.merge_into[0].tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert chosen.merge_into[1].tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("family", "kind"), [("llava_next", "image"), ("llava_onevision", "video"), ("qwen2_5_vl", "image")]
)
@pytest.mark.parametrize("keep", [2, 3, 7, 0.3])
def test_the_count_is_exact_for_tiles_and_videos(family, kind, keep):
    model = mustdrop.patch(clone(family), "pooling", keep=keep)
    answer(model, batch(registry()[family], model, ((kind,), (), (kind, kind))), steps=2)
    trace = mustdrop.trace(model)
    assert trace.tokens[0].tolist() == [int(keep * n) if keep < 1 else min(keep, n) for n in trace.total.tolist()]


def test_budgets_are_checked():
    with pytest.raises(BudgetError):
        mustdrop.patch(clone("llava"), "pooling", keep=0)
