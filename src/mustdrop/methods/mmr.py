"""MMR: maximal marginal relevance, token by token (IDPruner, arXiv 2602.13315).

UniAttn does the same with another balance.
"""

from __future__ import annotations

import torch
from pydantic import Field

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.pruners.weighing import ImportanceKnob, WeighingRule, importance_of
from mustdrop.rules.diversity import farthest_first
from mustdrop.rules.scores import min_max


class MarginalRelevance(ComparingRule, WeighingRule):
    """The most important feature, then always the one with the highest balance * importance - (1 - balance) * likeness.

    Importance is spread from 0 to 1 in each view; likeness is the cosine with the nearest pick alone. So this is
    farthest-first with a bonus, and no coverage, which adds up what a pick explains of all features.

    Attributes:
        importance: what makes a feature important.
        balance: weight of importance against likeness, in [0, 1].
        geometry: how features are compared. Except for "raw", importance is multiplied with how distinct a feature is.
    """

    balance: float = Field(0.5, ge=0, le=1)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`."""
        assert count is not None
        worth = self.weighed(min_max(self.importance.score(seen).float()), seen)
        picks = farthest_first(
            self.centred(seen),
            count,
            weight=torch.full_like(worth, 1 - self.balance),
            bonus=self.balance * worth,
            first=worth.argmax(1),
        )
        return Selection.picked(picks)


class MMR(Comparing, Recipe):
    """Important features that differ from each other, greedily per view; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        importance: "attention" of the encoder, the likeness with the "question", what is "distinct" from the mean, the
            folder of a scorer, a module, or an `Importance` of your own.
        balance: weight of importance against likeness, in [0, 1]; IDPruner has 0.5, UniAttn 1 / 1.3, and 1 keeps the
            most important.
    """

    keep: Budget = DEFAULT_KEEP
    importance: ImportanceKnob = "attention"
    balance: float = Field(0.5, ge=0, le=1)

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = MarginalRelevance(
            importance=importance_of(self.importance), balance=self.balance, geometry=self.geometry
        )
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
