"""DivPrune: the features that differ most from each other (arXiv 2503.02175)."""

from __future__ import annotations

from typing import ClassVar

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Chosen, Features, VisionRule, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.rules.diversity import farthest_first


class MaxMinDiversity(VisionRule):
    """Of all features of an image or video, those whose nearest kept feature is farthest, picked greedily."""

    by_view: ClassVar[bool] = False

    def choose(self, seen: Features, count: int | None) -> Chosen:
        """See `VisionRule.choose`."""
        assert count is not None
        return Chosen(farthest_first(seen.values, count).sort(1).values)


class DivPrune(Recipe):
    """Max-min diversity of the features that enter the language model. It reads neither attention nor the question.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
    """

    keep: Budget = DEFAULT_KEEP

    def build(self) -> Method:
        """Only the vision socket is filled."""
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=MaxMinDiversity()))
