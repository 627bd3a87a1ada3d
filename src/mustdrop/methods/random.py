"""Baseline: a random subset of the vision tokens enters the language model."""

from __future__ import annotations

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import VisionStagePruner
from mustdrop.pruners.base import Budget


class Random(Recipe):
    """Keep `keep` tokens drawn at random before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        seed: the draw depends on (number of tokens, seed) alone.
    """

    keep: Budget = DEFAULT_KEEP
    seed: int = 0

    def build(self) -> Method:
        """Only the vision socket is filled."""
        return Method(
            vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score="random", seed=self.seed)
        )
