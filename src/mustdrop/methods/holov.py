"""HoloV: crops share the budget (arXiv 2510.02912)."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mustdrop.constants import numbers
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.pruners.weighing import ImportanceKnob, WeighingRule, importance_of
from mustdrop.rules.diversity import unit
from mustdrop.rules.groups import best_in_groups, largest_remainder

# Weight of the variance, and how many crops there are: 16 where 64 of 576 features stay.
WEIGHT = 0.09
CROPS = 1024 / 576


class CropsByContext(ComparingRule, WeighingRule):
    """The most attended features of each crop, a run of features in raster order; attended and varied crops keep more.

    Attributes:
        importance: what takes the place of the attention.
        crops: how many, or None: the fewer the larger the budget.
        weight: of the variance of a crop's likenesses beside its attention.
    """

    crops: int | None = Field(None, ge=1)
    weight: float = Field(WEIGHT, ge=0)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`. What a full crop cannot take goes to the others."""
        assert count is not None
        attention = self.weighed(self.importance.positive(seen), seen)
        n = attention.shape[1]
        crops = self.crops_of(n, count)
        place = torch.arange(n, dtype=torch.long, device=attention.device)
        crop = place * crops // n
        sides = np.bincount(np.arange(n) * crops // n, minlength=crops).tolist()
        size = numbers(sides, attention.device)
        directions = unit(self.centred(seen))
        pieces = zip(attention.split_with_sizes(sides, 1), directions.split_with_sizes(sides, 1), strict=True)
        given, varied = (torch.stack(made, 1) for made in zip(*(_context(*piece) for piece in pieces), strict=True))
        # the variance in the unit of the attention: by means over the picture, so that it tells crops apart
        scale = given.mean(1, keepdim=True) / varied.mean(1, keepdim=True).clamp(min=1e-12)
        worth = given + self.weight * varied * scale
        budget = largest_remainder(worth, count, size.expand(len(worth), -1))
        return Selection(best_in_groups(attention, crop.expand_as(attention), budget, count))

    def crops_of(self, features: int, count: int) -> int:
        """How many crops a view is cut into."""
        wanted = int(CROPS * features / count) if self.crops is None else self.crops
        return min(features, max(1, wanted))


def _context(attention: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) twice, of one crop: its mean attention, and the mean variance of a feature's likenesses with the others."""
    likeness = directions @ directions.mT
    n = attention.shape[1]
    same = likeness.diagonal(0, 1, 2)
    others = max(1, n - 1)
    mean = (likeness.sum(2) - same) / others
    variance = ((likeness - mean[..., None]).square().sum(2) - (same - mean).square()) / others
    return attention.mean(1), variance.mean(1)


class HoloV(Comparing, Recipe):
    """Crops share the budget by attention and context, and keep what is attended; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        crops: per view; None: 1024 / `keep` of LLaVA's 576 tokens, and in proportion elsewhere.
        weight: of the variance of a crop's likenesses beside its attention.
        importance: "attention" of the encoder; or in its place the likeness with the "question", what is "distinct"
            from the mean, the folder of a scorer, a module, or an `Importance` of your own.
    """

    keep: Budget = DEFAULT_KEEP
    crops: int | None = Field(None, ge=1)
    weight: float = Field(WEIGHT, ge=0)
    importance: ImportanceKnob = "attention"

    def build(self) -> Method:
        """Only the vision socket is filled."""
        weighed = importance_of(self.importance)
        rule = CropsByContext(importance=weighed, crops=self.crops, weight=self.weight, geometry=self.geometry)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
