"""FasterVLM: highest CLS attention (arXiv 2412.01818, first version)."""

from __future__ import annotations

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.methods.vispruner import ImportantAndDiverse
from mustdrop.pruners import VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.weighing import ImportanceKnob, importance_of


class FasterVLM(Recipe):
    """The most attended features of each view enter the language model: VisPruner without its diverse part.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        importance: "attention" of the encoder; or in its place the likeness with the "question", what is "distinct"
            from the mean, the folder of a scorer, a module, or an `Importance` of your own. One that reads the features
            of the language model moves the choice after the projector.
    """

    keep: Budget = DEFAULT_KEEP
    importance: ImportanceKnob = "attention"

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = ImportantAndDiverse(importance=importance_of(self.importance), important=1)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
