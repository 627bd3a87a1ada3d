"""FasterVLM: what the encoder's CLS token looks at (arXiv 2412.01818, first version)."""

from __future__ import annotations

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.methods.vispruner import ImportantAndDiverse
from mustdrop.pruners import VisionStagePruner
from mustdrop.pruners.base import Budget


class FasterVLM(Recipe):
    """The most attended features of each view enter the language model: VisPruner without its diverse part.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
    """

    keep: Budget = DEFAULT_KEEP

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = ImportantAndDiverse(important=1)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
