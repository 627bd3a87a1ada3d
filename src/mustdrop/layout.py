"""`Layout`: how the features of one image or video lie, and which encoder patches each of them comes from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mustdrop.constants import table

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Layout:
    """The feature rows of one medium (an image, with all its tiles, or a video), in the order of the prompt.

    Attributes:
        grids: (frames, rows, columns) of each grid of cells that the features form: one for a plain image or a video,
            one more for the tiles where the model looks at an image twice.
        cells: (N,) long, for each feature its cell, counted over all grids in raster order; -1 for structural rows
            (line breaks, a CLS row), which stand for no part of the picture.
        patches: (N, k) long, the encoder patches that a feature is made of, counted over all items of the encoder's
            batch (item * patches per item + patch); -1 fills up.
    """

    grids: tuple[Grid, ...]
    cells: Tensor
    patches: Tensor

    @property
    def size(self) -> int:
        """N, features of the medium."""
        return len(self.cells)

    @functools.cached_property
    def structural(self) -> Tensor:
        """(N,) bool, rows that stand for no part of the picture."""
        return self.cells < 0

    @functools.cached_property
    def cell_table(self) -> np.ndarray:
        """`cells`, for arithmetic on the host."""
        return table(self.cells)

    @functools.cached_property
    def patch_table(self) -> np.ndarray:
        """`patches` as a table of numpy."""
        return table(self.patches)

    @functools.cached_property
    def gaps(self) -> np.ndarray:
        """`structural` as a table of numpy."""
        return self.cell_table < 0

    @functools.cached_property
    def in_picture(self) -> int:
        """Rows that stand for a part of the picture."""
        return self.size - int(self.gaps.sum())

    def items(self, patches: int) -> tuple[list[int], list[int]]:
        """Items of the encoder's batch, of so many patches each, that its features come from, and how many from each.

        A feature made of several patches counts where the first of them lies.
        """
        first = self.patch_table[:, 0]
        numbers, counts = np.unique(first[first >= 0] // patches, return_counts=True)
        return numbers.tolist(), counts.tolist()

    @property
    def offsets(self) -> tuple[int, ...]:
        """First cell of each grid, and the number of cells."""
        edges = [0]
        for frames, rows, columns in self.grids:
            edges.append(edges[-1] + frames * rows * columns)
        return tuple(edges)

    @classmethod
    def of_frames(
        cls, grid: Grid, encoder_grid: tuple[int, int], first: int = 0, *, pool: int = 1, prefix: int = 0
    ) -> Layout:
        """Frames that the encoder saw one by one, each `pool` x `pool` patches to a feature.

        Args:
            grid: (frames, rows, columns) of the features.
            encoder_grid: (rows, columns) of the patches of one frame.
            first: place of the first frame in the encoder's batch.
            pool: side of the square of patches that makes one feature.
            prefix: structural rows before the features of each frame (a CLS row that the model keeps).
        """
        return cls((grid,), *_of_frames(grid, encoder_grid, first, pool, prefix))

    def with_breaks(self, count: int = 1, each_row: bool = False) -> Layout:
        """The same features with structural rows: `count` at the end, or one after each row of the (one) grid."""
        if each_row:
            frames, lines, columns = self.grids[0]  # a picture that is very thin has none of the one or the other
            cells = self.cells.view(frames * lines, columns)
            cells = torch.nn.functional.pad(cells, (0, 1), value=-1).flatten()
            patches = self.patches.view(frames * lines, columns, self.patches.shape[1])
            patches = torch.nn.functional.pad(patches, (0, 0, 0, 1), value=-1)
            return Layout(self.grids, cells, patches.flatten(0, 1))
        pad = torch.nn.functional.pad
        return Layout(self.grids, pad(self.cells, (0, count), value=-1), pad(self.patches, (0, 0, 0, count), value=-1))

    @classmethod
    def join(cls, parts: Sequence[Layout]) -> Layout:
        """Several parts of one medium, one after the other."""
        width = max((part.patches.shape[1] for part in parts), default=1)
        grids: tuple[Grid, ...] = ()
        cells, patches, base = [], [], 0
        for part in parts:
            cells.append(torch.where(part.structural, -1, part.cells + base))
            patches.append(torch.nn.functional.pad(part.patches, (0, width - part.patches.shape[1]), value=-1))
            grids, base = grids + part.grids, base + part.offsets[-1]
        if not parts:
            return cls(
                (),
                torch.zeros(0, dtype=torch.long, device="cpu"),
                torch.zeros(0, width, dtype=torch.long, device="cpu"),
            )
        return cls(grids, torch.cat(cells), torch.cat(patches))


#: What `_of_frames` has made, for the few grids that a model sees all day.
_KNOWN: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
_MOST = 64


def _of_frames(grid: Grid, encoder_grid: tuple[int, int], first: int, pool: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Cells and patches of `Layout.of_frames`. Layouts share them, and nobody writes to them."""
    key = (grid, encoder_grid, first, pool, prefix)
    if key in _KNOWN:
        return _KNOWN[key]
    with torch.inference_mode(False):  # a later call may train
        frames, rows, columns = grid
        height, width = encoder_grid
        patch = torch.arange(height * width, dtype=torch.long, device="cpu").view(height, width)[
            : rows * pool, : columns * pool
        ]
        patch = patch.reshape(rows, pool, columns, pool).transpose(1, 2).reshape(rows * columns, pool * pool)
        item = (first + torch.arange(frames, dtype=torch.long, device="cpu")) * height * width
        patches = torch.nn.functional.pad(item[:, None, None] + patch, (0, 0, prefix, 0), value=-1)
        cells = torch.arange(frames * rows * columns, dtype=torch.long, device="cpu").view(frames, -1)
        cells = torch.nn.functional.pad(cells, (prefix, 0), value=-1)
        made = cells.flatten(), patches.flatten(0, 1)
    if all(type(x) is Tensor for x in made):  # and not what stands in for a tensor while something is traced
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[key] = made
    return made
