"""MMR: maximal marginal relevance, token by token (IDPruner, arXiv 2602.13315).

UniAttn does the same with another balance.
"""

from __future__ import annotations

import torch
from pydantic import Field

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Read, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import STATES, compared
from mustdrop.pruners.weighing import ImportanceKnob, WeighingRule, importance_of
from mustdrop.rules.diversity import farthest_first
from mustdrop.rules.geometry import Geometry, around_mean, distinctiveness
from mustdrop.rules.scores import min_max


class MarginalRelevance(WeighingRule):
    """The most important feature, then always the one with the highest balance * importance - (1 - balance) * likeness.

    Importance is spread from 0 to 1 in each view; likeness is the cosine with the nearest pick.

    Attributes:
        importance: what makes a feature important.
        balance: weight of importance against likeness, in [0, 1].
        geometry: how features are compared. Except for "raw", importance is multiplied with how distinct a feature is.
    """

    balance: float = Field(0.5, ge=0, le=1)
    geometry: Geometry = "raw"

    @property
    def own_reads(self) -> tuple[Read, ...]:
        """What leaves the encoder, if that is compared."""
        return STATES if self.geometry == "standardized" else ()

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`."""
        assert count is not None
        values = compared(seen, self.geometry)
        worth = min_max(self.importance.score(seen).float()) * distinctiveness(values, self.geometry)
        picks = farthest_first(
            around_mean(values, self.geometry),
            count,
            weight=torch.full_like(worth, 1 - self.balance),
            bonus=self.balance * worth,
            first=worth.argmax(1),
        )
        return Selection.picked(picks)


class MMR(Recipe):
    """Important features that differ from each other, greedily per view; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        importance: "attention" of the encoder, the likeness with the "question", what is "distinct" from the mean, the
            folder of a scorer, a module, or an `Importance` of your own.
        balance: weight of importance against likeness, in [0, 1]; IDPruner has 0.5, UniAttn 1 / 1.3, and 1 keeps the
            most important.
        geometry: "raw" compares features as they are; "centered" around their mean, and distinct ones count more;
            "standardized" does so with the encoder's, with channels of equal variance.
    """

    keep: Budget = DEFAULT_KEEP
    importance: ImportanceKnob = "attention"
    balance: float = Field(0.5, ge=0, le=1)
    geometry: Geometry = "raw"

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = MarginalRelevance(
            importance=importance_of(self.importance), balance=self.balance, geometry=self.geometry
        )
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
