"""SCOPE: attention times coverage gain, greedily (arXiv 2510.24214)."""

from __future__ import annotations

from pydantic import Field

from mustdrop import kernels
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.pruners.weighing import ImportanceKnob, WeighingRule, importance_of
from mustdrop.rules.diversity import unit
from mustdrop.rules.geometry import distinctiveness


class AttendedCoverage(ComparingRule, WeighingRule):
    """Each pick adds the most coverage times attention.

    A feature is covered as well as it resembles the pick that it resembles most, and not at all below 0.

    Attributes:
        importance: what coverage is weighed with.
        alpha: exponent of the importance, 0 or more; 0 goes by coverage alone.
        geometry: how features are compared. Except for "raw", attention is multiplied with how distinct a feature is.
    """

    alpha: float = Field(1.0, ge=0)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`."""
        assert count is not None
        attention = self.importance.positive(seen)
        # a common factor changes no choice, and keeps small numbers from vanishing
        share = attention / attention.amax(1, keepdim=True).clamp(min=1e-30)
        quality = share**self.alpha * distinctiveness(self.compared(seen), self.geometry)
        directions = unit(self.centred(seen))
        return Selection.picked(kernels.greedy_coverage(directions @ directions.mT, count, quality=quality))


class Scope(Comparing, Recipe):
    """Encoder attention times what a feature adds to the coverage of its view; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        alpha: exponent of the importance; 0 goes by coverage alone.
        importance: "attention" of the encoder, the likeness with the "question", what is "distinct" from the mean, the
            folder of a scorer, a module, or an `Importance` of your own.
    """

    keep: Budget = DEFAULT_KEEP
    alpha: float = Field(1.0, ge=0)
    importance: ImportanceKnob = "attention"

    def build(self) -> Method:
        """Only the vision socket is filled."""
        weighed = importance_of(self.importance)
        rule = AttendedCoverage(importance=weighed, alpha=self.alpha, geometry=self.geometry)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
