"""Baseline: the picture at a resolution at which it has as many tokens as may stay."""

from __future__ import annotations

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.methods.pooling import AveragePooling
from mustdrop.pruners import PictureRule, VisionStagePruner
from mustdrop.pruners.base import Budget


class LowResolution(PictureRule, AveragePooling):
    """The encoder sees a smaller picture, or the detail of one; its features are averaged to the number that may stay.

    Where the encoder takes pictures of any size it gets one of the smallest grid with enough tokens. Where it takes one
    size it gets a picture of that size with the detail of a smaller one.
    """


class Downsample(Recipe):
    """Resize the picture (or its detail) until its tokens meet the budget.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
    """

    keep: Budget = DEFAULT_KEEP

    def build(self) -> Method:
        """Only the vision socket is filled."""
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=LowResolution()))
