"""VisPruner: half by attention, half diverse (arXiv 2412.01818, final version)."""

from __future__ import annotations

import torch
from pydantic import Field

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.pruners.weighing import EncoderWeighingRule, ImportanceKnob, importance_of
from mustdrop.rules.diversity import without_duplicates


class ImportantAndDiverse(ComparingRule, EncoderWeighingRule):
    """The most attended features stay; of the others, duplicates leave until the count is met.

    Attributes:
        importance: what takes the place of the attention.
        important: share of what stays that is chosen by attention, in [0, 1].
        geometry: how features are compared. Except for "raw", attention is multiplied with how distinct a feature is,
            both from 0 to 1, as Cen-Prune (arXiv 2608.30263) has it for scores of saliency.
    """

    important: float = Field(0.5, ge=0, le=1)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`."""
        assert count is not None
        attention = self.weighed(self.importance.score(seen), seen)
        ranked = attention.argsort(dim=1, descending=True, stable=True)
        # a hair above the product: 0.29 * 100 is 28.999999999999996 in floating point and must be 29
        top = int(count * self.important + 1e-9)
        diverse = without_duplicates(self.centred(seen), ranked[:, top:], count - top)
        return Selection(torch.cat([ranked[:, :top], diverse], 1).sort(1).values)


class VisPruner(Comparing, Recipe):
    """Important tokens by encoder attention, diverse ones by removing duplicates; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens, important and diverse together.
        important: share of `keep` that is important.
        importance: "attention" of the encoder; or in its place the likeness with the "question", what is "distinct"
            from the mean, the folder of a scorer, a module, or an `Importance` of your own. One that reads the features
            of the language model moves the choice after the projector.
    """

    keep: Budget = DEFAULT_KEEP
    important: float = Field(0.5, ge=0, le=1)
    importance: ImportanceKnob = "attention"

    def build(self) -> Method:
        """Only the vision socket is filled."""
        weighed = importance_of(self.importance)
        rule = ImportantAndDiverse(importance=weighed, important=self.important, geometry=self.geometry)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
