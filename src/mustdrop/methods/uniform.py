"""Baseline: vision tokens spread evenly over the image enter the language model."""

from __future__ import annotations

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import VisionStagePruner
from mustdrop.pruners.base import Budget


class Uniform(Recipe):
    """Keep `keep` tokens, spread evenly over the raster order of each image.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
    """

    keep: Budget = DEFAULT_KEEP

    def build(self) -> Method:
        """Only the vision socket is filled."""
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score="uniform"))
