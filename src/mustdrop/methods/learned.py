"""Learned: highest scores of a trained scorer; `mustdrop fit` trains one."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from mustdrop import kernels
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.scored import FromModel
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.pruners.weighing import ImportanceKnob, WeighingRule, importance_of
from mustdrop.rules.diversity import unit
from mustdrop.rules.scores import min_max


class Important(ComparingRule, WeighingRule):
    """The most important features of an image or video; all its views compete.

    Attributes:
        importance: what makes a feature important.
        coverage: exponent of the importance where each pick adds the most coverage times importance, as in `scope`; 0
            ranks by importance alone. None: what the scorer was found to do best with, else 0.
    """

    by_view: ClassVar[bool] = False
    coverage: float | None = Field(None, ge=0)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`."""
        assert count is not None
        power = self.coverage
        if power is None:
            power = float(getattr(getattr(self.importance, "module", None), "coverage", 0.0))
        score = self.weighed(self.importance.score(seen).float(), seen)
        return choice(self.centred(seen), score, count, power)


def choice(values: Tensor, score: Tensor, count: int, coverage: float) -> Selection:
    """The `count` features (B, N, C) with the highest score (B, N), or that cover most in proportion to it.

    Args:
        values: features.
        score: of each.
        count: how many stay.
        coverage: exponent of the score, spread from 0 to 1, beside the coverage that a pick adds; 0 ranks.
    """
    if not coverage:
        return Selection.best(score, count)
    directions = unit(values)
    return Selection.picked(
        kernels.greedy_coverage(directions @ directions.mT, count, quality=min_max(score) ** coverage)
    )


class Learned(Comparing, Recipe):
    """The features that a trained scorer ranks highest; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        importance: the folder of a scorer, a module, an `Importance` of your own, or a name that other methods take;
            None: the scorer that comes with the model, the folder `scorer` within its own.
        coverage: 0 ranks by importance alone; above, each pick adds the most importance, to this power, times what the
            picks so far do not cover. None: what `mustdrop fit` found best on its held-out prompts; 0 for a module.
    """

    trained: ClassVar[bool] = True
    keep: Budget = DEFAULT_KEEP
    importance: ImportanceKnob | None = None
    coverage: float | None = Field(None, ge=0)

    def build(self) -> Method:
        """Only the vision socket is filled."""
        weighed: Any = FromModel() if self.importance is None else importance_of(self.importance)
        rule = Important(importance=weighed, coverage=self.coverage, geometry=self.geometry)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
