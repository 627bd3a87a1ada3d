"""Baseline: average pooling of the vision tokens over their grid."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from mustdrop.constants import on_host, sent
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionRule, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.rules.cells import centres, square_cells


class AveragePooling(VisionRule):
    """Images and videos are cut into nearly square cells, which become their mean; the patch in the middle is named."""

    by_view: ClassVar[bool] = False

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`. What has the same shape is cut once."""
        assert count is not None
        place = np.stack([on_host(x) for x in (seen.frame, seen.row, seen.column)], 1)
        place = place - place.min(2, keepdims=True)
        shapes, shape = np.unique(place, axis=0, return_inverse=True)
        cut = []
        for one in map(torch.from_numpy, shapes):
            cells = square_cells(one, count)
            cut.append((centres(one, cells).numpy(), cells.numpy()))
        names, into = (np.stack(parts)[shape.reshape(-1)] for parts in zip(*cut, strict=True))
        return Selection.merged(sent(names, seen.values.device), sent(into, seen.values.device))


class Pooling(Recipe):
    """Average the tokens of each image or video over cells of its grids, `keep` in all.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
    """

    keep: Budget = DEFAULT_KEEP

    def build(self) -> Method:
        """Only the vision socket is filled."""
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=AveragePooling()))
