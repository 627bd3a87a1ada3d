"""DivPrune: maximal minimum distance between tokens (arXiv 2503.02175)."""

from __future__ import annotations

from typing import ClassVar

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.rules.diversity import farthest_first
from mustdrop.rules.geometry import distinctiveness


class MaxMinDiversity(ComparingRule):
    """Of all features of an image or video, those whose nearest kept feature is farthest, picked greedily.

    Attributes:
        geometry: how features are compared. Except for "raw", each distance is multiplied with how distinct the feature
            is that would be picked (but for the first pick), as in Cen-Prune (arXiv 2608.30263).
    """

    by_view: ClassVar[bool] = False

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`."""
        assert count is not None
        centred = self.centred(seen)
        if self.geometry == "raw":
            return Selection.picked(farthest_first(centred, count))
        distinct = distinctiveness(self.compared(seen), self.geometry)
        first = farthest_first(centred, 1)[:, 0]
        return Selection.picked(farthest_first(centred, count, weight=distinct, first=first))


class DivPrune(Comparing, Recipe):
    """Max-min diversity of the features that enter the language model. It reads neither attention nor the question.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        geometry: "raw" compares features as they are; "centered" around their mean, and distinct ones first;
            "standardized" does so with the encoder's, with channels of equal variance (for Qwen's encoders).
    """

    keep: Budget = DEFAULT_KEEP

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = MaxMinDiversity(geometry=self.geometry)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
