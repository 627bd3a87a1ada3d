"""CDPruner: relevant to the question, mutually diverse (arXiv 2506.10967)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Importance, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.importance import Question
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.pruners.weighing import ImportanceKnob, WeighingRule, importance_of
from mustdrop.rules.diversity import greedy_determinant
from mustdrop.rules.geometry import distinctiveness


class ConditionalDeterminant(ComparingRule, WeighingRule):
    """A conditional determinantal point process: the largest determinant of relevance x cosine x relevance, greedily.

    The relevance of a feature is its mean cosine with the words of the question, scaled to 0 ... 1 over the view.

    Attributes:
        importance: what takes the place of the relevance, scaled as that is.
        theta: weight of relevance against diversity, in [0, 1): relevance r becomes exp(r theta / (2 (1 - theta))).
            None takes r as it is.
        geometry: how features are compared with each other. Except for "raw", relevance is multiplied with how distinct
            a feature is, as in Cen-Prune (arXiv 2608.30263).
    """

    importance: Importance = Question()
    theta: float | None = Field(None, ge=0, lt=1)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`."""
        assert count is not None
        quality = self.quality(self.importance.score(seen).float())
        quality = quality * distinctiveness(self.compared(seen), self.geometry)
        return Selection.picked(greedy_determinant(self.centred(seen), quality, count))

    def quality(self, relevant: Tensor) -> Tensor:
        """(B, N) positive, from relevances (B, N); equal ones where all relevances of a view are equal."""
        low, high = relevant.aminmax(dim=1, keepdim=True)
        spread = high - low
        scaled = torch.where(spread > 0, (relevant - low + 1e-6) / torch.where(spread > 0, spread, 1.0), 1.0)
        if self.theta is None:
            return scaled
        # a common factor changes no choice: the highest is exp(0), so that nothing overflows
        return (self.theta / (2 * (1 - self.theta)) * (scaled - scaled.amax(1, keepdim=True))).clamp(min=-40).exp()


class CDPruner(Comparing, Recipe):
    """Relevance to the question times diversity, per view.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        theta: weight of relevance against diversity, in [0, 1); None leaves relevance unscaled, as the paper does.
        importance: what takes the place of the likeness with the "question": "attention" of the encoder, what is
            "distinct" from the mean, the folder of a scorer, a module, or an `Importance` of your own.
    """

    keep: Budget = DEFAULT_KEEP
    theta: float | None = Field(None, ge=0, lt=1)
    importance: ImportanceKnob = "question"

    def build(self) -> Method:
        """Only the vision socket is filled."""
        weighed = importance_of(self.importance)
        rule = ConditionalDeterminant(importance=weighed, theta=self.theta, geometry=self.geometry)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
