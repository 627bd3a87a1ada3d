"""VisionZip: dominant tokens, contextual merged ones (arXiv 2412.04467)."""

from __future__ import annotations

import torch
from pydantic import Field

from mustdrop import kernels
from mustdrop.indices import take
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Read, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import LAST, Comparing, ComparingRule
from mustdrop.pruners.weighing import EncoderWeighingRule, ImportanceKnob, importance_of
from mustdrop.rules.geometry import around_mean

# The published split at every budget: 54 dominant tokens and 10 contextual ones of 64.
CONTEXTUAL = 10 / 64


class DominantAndContextual(ComparingRule, EncoderWeighingRule):
    """The most attended features stay; the others join evenly spaced ones among them that resemble them in their keys.

    Attributes:
        importance: what takes the place of the attention.
        contextual: share of what stays that is contextual, in [0, 1).
    """

    contextual: float = Field(CONTEXTUAL, ge=0, lt=1)

    @property
    def own_reads(self) -> tuple[Read, ...]:
        """Keys of the layer that features are read from (in LLaVA, 22 of the 23 that it runs)."""
        return (Read(what="keys", **LAST),)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`. A contextual token is its own value plus the mean of those that join it."""
        attention = self.weighed(self.importance.score(seen), seen)
        keys = around_mean(seen.of(self.own_reads[0]), self.geometry)
        batch, n = attention.shape
        assert count is not None
        targets = min(round(count * self.contextual), count - 1)
        ranked = attention.argsort(dim=1, descending=True, stable=True)
        dominant = ranked[:, : count - targets].sort(1).values
        if not targets:
            return Selection(dominant)
        rest = ranked[:, count - targets :].sort(1).values
        step = rest.shape[1] // targets
        target = torch.arange(0, step * targets, step, dtype=torch.long, device=rest.device)
        keys = take(keys, rest, 1, padded=False)
        _, slot = kernels.best_match(keys, keys[:, target])
        slot[:, target] = torch.arange(targets, dtype=torch.long, device=slot.device)
        into = torch.full((batch, n), -1, dtype=torch.long, device=rest.device)
        into.scatter_(1, rest, slot + dominant.shape[1])
        columns = torch.arange(dominant.shape[1], dtype=torch.long, device=rest.device).expand_as(dominant)
        into.scatter_(1, dominant, columns)
        centre = rest[:, target]
        joined = into.scatter(1, centre, -1).scatter(1, dominant, -1)

        def blend(values: torch.Tensor) -> torch.Tensor:
            own = take(values, torch.cat([dominant, centre], 1), 1, padded=False)
            return own + kernels.merge_tokens(values, joined, count)

        return Selection(torch.cat([dominant, centre], 1), merge_into=into, blend=blend)


class VisionZip(Comparing, Recipe):
    """Dominant tokens by encoder attention, contextual tokens by merging; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens, dominant and contextual together.
        contextual: share of `keep` that is contextual.
        geometry: how keys are compared: "raw" as they are, "centered" around their mean, "standardized" around it and
            with channels of equal variance. Except for "raw", importance is multiplied with how distinct a feature is.
        importance: "attention" of the encoder; or in its place the likeness with the "question", what is "distinct"
            from the mean, the folder of a scorer, a module, or an `Importance` of your own. One that reads the features
            of the language model moves the choice after the projector.
    """

    keep: Budget = DEFAULT_KEEP
    contextual: float = Field(CONTEXTUAL, ge=0, lt=1)
    importance: ImportanceKnob = "attention"

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = DominantAndContextual(
            importance=importance_of(self.importance), contextual=self.contextual, geometry=self.geometry
        )
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
