"""LLaVA-PruMerge: CLS attention, the rest merges (arXiv 2403.15388). PruMerge+ samples too."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mustdrop.errors import ConfigError
from mustdrop.indices import take
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Read, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget, Compat
from mustdrop.pruners.importance import Attention, Importance
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.pruners.weighing import EncoderWeighingRule, ImportanceKnob, importance_of
from mustdrop.rules.geometry import around_mean


class JointAttention(Attention):
    """Attention of the last layer, whose heads are not told apart."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """See `Importance.reads`."""
        return (Read(what="joint_attention", layer=-1),)


class PruneAndMerge(ComparingRule, EncoderWeighingRule):
    """Kept features take in their nearest ones, weighted with attention; the last of them takes in all that goes.

    Attributes:
        importance: what takes the place of the attention, in the ranking and in the weights.
        plus: whether evenly spaced features are kept beside the most attended ones.
        neighbours: features, kept ones included, that each kept feature takes in.
        ratio: share of the features that is kept by attention where nobody sets a number; None counts the outliers of
            the attention (above the third quartile by 1.5 interquartile ranges).
        compat: "released" samples as the authors' code does, some features twice.
    """

    importance: Importance = JointAttention()
    plus: bool = False
    neighbours: int = Field(32, ge=0)
    ratio: float | None = Field(None, gt=0, le=1)
    compat: Compat = "paper"

    @property
    def own_reads(self) -> tuple[Read, ...]:
        """Keys of the last layer, whose heads are not told apart."""
        return (Read(what="joint_keys", layer=-1),)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`. One of `count` is the sum of what goes, weighted with attention."""
        attention = self.weighed(self.importance.positive(seen), seen)
        keys = around_mean(seen.of(self.own_reads[0]), self.geometry)
        n = attention.shape[1]
        if count == 1:
            return Selection.best(attention, 1)
        ranked = attention.argsort(dim=1, descending=True, stable=True)
        top, sampled = self._amounts(attention, count)
        names = torch.cat([ranked[:, :top], self._samples(ranked, top, sampled, n)], 1)
        if names.shape[1] >= n:
            return Selection(ranked.sort(1).values)
        kept = torch.zeros_like(attention, dtype=torch.bool).scatter(1, names, True)
        others = kept.long().argsort(dim=1, stable=True)  # those that are kept come last
        slots, gone = names, others[:, : n - names.shape[1]]
        if sampled is None:
            slots, gone = self._named_twice(names, top, others[:, : n - int(kept[0].sum())])
        weight = attention.gather(1, gone)
        spare = gone.gather(1, weight.argmax(1, keepdim=True))  # the most attended names what takes in all that goes
        last = torch.zeros_like(attention).scatter(1, gone, weight)
        weights = torch.cat([self._near(names, gone, keys, attention), last[:, None]], 1)
        return Selection(torch.cat([slots, spare], 1), blend=lambda values: weights.to(values) @ values)

    @staticmethod
    def _named_twice(names: Tensor, top: int, others: Tensor) -> tuple[Tensor, Tensor]:
        """The released sampling names some features twice: (slots, what is gone).

        Their copies lie where the first of the others go, which nothing takes in then (so it is in the released code).
        """
        again = torch.isin(names[0], names[0, :top]) & (
            torch.arange(names.shape[1], dtype=torch.long, device=names.device) >= top
        )
        copies, gone = others.tensor_split([int(again.sum())], dim=1)
        slots = names.clone()
        slots[:, again] = copies
        return slots, gone

    def _amounts(self, attention: Tensor, count: int | None) -> tuple[int, int | None]:
        """(kept by attention, kept by sampling); None samples with the released step."""
        n = attention.shape[1]
        if count is not None:
            top = (count if self.plus else 2 * (count - 1)) // 2
            return top, count - 1 - top
        ratio = self.ratio
        if ratio is None:
            low, high = torch.quantile(
                attention.float(), torch.tensor([0.25, 0.75], dtype=torch.float32, device=attention.device)
            )
            ratio = float((attention > high + 1.5 * (high - low)).sum()) / attention.numel()
        top = max(1, min(int(n * ratio), n - 1))
        if not self.plus:
            return top, 0
        return top, None if self.compat == "released" else min(3 * top, n - 1 - top)

    def _samples(self, ranked: Tensor, top: int, number: int | None, n: int) -> Tensor:
        """(B, k) long, evenly spaced features."""
        if number is None:
            return self._released_samples(ranked, top, n)
        rest = ranked[:, top:].sort(1).values
        place = (
            (torch.arange(number, dtype=torch.long, device=ranked.device) * 2 + 1) * rest.shape[1] // max(1, 2 * number)
        )
        return rest[:, place]

    def _released_samples(self, ranked: Tensor, top: int, n: int) -> Tensor:
        """(1, k) long: every s-th feature, never the last one; with a fixed ratio also those that are kept already."""
        if self.ratio is not None:
            step = int(1 / self.ratio)
            return torch.arange(int(step / 2), n - 1, step, dtype=torch.long, device=ranked.device)[None]
        step = int(int(n / top) / 3)
        if not step:
            raise ConfigError(
                f"the authors' sampling fails where more than a third is kept; it would keep {top} of {n} features: "
                'use compat="paper".'
            )
        every = torch.arange(0, n - 1, step, dtype=torch.long, device=ranked.device)
        return every[~torch.isin(every, ranked[0, :top])][None]

    def _near(self, names: Tensor, gone: Tensor, keys: Tensor, attention: Tensor) -> Tensor:
        """(B, k, N) weights: 1 for the feature itself, their attention for its nearest neighbours by keys."""
        keys = torch.nn.functional.normalize(keys, dim=2)
        others = torch.cat([names, gone], 1)  # a feature that is named twice can be taken in twice
        similar = take(keys, names, 1, padded=False) @ take(keys, others, 1, padded=False).transpose(1, 2)
        similar.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        near = similar.topk(min(self.neighbours, others.shape[1] - 1), dim=2).indices
        index = others[:, None].expand_as(similar).gather(2, near)
        weights = keys.new_zeros(*names.shape, keys.shape[1])
        weights.scatter_add_(2, index, attention[:, None].expand_as(weights).gather(2, index))
        return weights.scatter_add(2, names[..., None], torch.ones_like(weights[..., :1]))


class PruMerge(Comparing, Recipe):
    """Keep the outliers of encoder attention, and merge what resembles them into them.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens; one third if nothing else says how many.
        adaptive: whether the outliers of the attention are counted, in place of `keep` (the paper's form).
        ratio: share of the features of a view that is kept by attention, in place of `keep`.
        plus: PruMerge+: evenly spaced features stay too.
        neighbours: features that each kept one takes in.
        geometry: how keys are compared: "raw" as they are, "centered" around their mean, "standardized" around it and
            with channels of equal variance. Except for "raw", importance is multiplied with how distinct a feature is.
        compat: "released" has the features in the order of their attention, with new positions; it has no `keep`.
        importance: "attention" of the encoder; or in its place the likeness with the "question", what is "distinct"
            from the mean, the folder of a scorer, a module, or an `Importance` of your own, spread from 0 to 1 where
            features are weighted with it. One that reads the features of the language model moves the choice after the
            projector.
    """

    keep: Budget | None = None
    adaptive: bool = False
    ratio: float | None = Field(None, gt=0, le=1)
    plus: bool = False
    neighbours: int = Field(32, ge=0)
    compat: Compat = "paper"
    importance: ImportanceKnob = "attention"

    def build(self) -> Method:
        """Only the vision socket is filled."""
        if (self.keep is not None) + self.adaptive + (self.ratio is not None) > 1:
            raise ConfigError(
                f"prumerge takes one of keep=, adaptive=True and ratio=, got keep={self.keep}, "
                f"adaptive={self.adaptive}, ratio={self.ratio}."
            )
        if self.compat == "released" and self.keep is not None:
            raise ConfigError(
                f'prumerge(compat="released") has no keep, because the authors\' code has none (got {self.keep}): '
                "give ratio=, or nothing for the adaptive number."
            )
        weighed = importance_of(self.importance, attention=JointAttention())
        rule = PruneAndMerge(
            importance=weighed,
            plus=self.plus,
            neighbours=self.neighbours,
            ratio=self.ratio,
            compat=self.compat,
            geometry=self.geometry,
        )
        keep: Budget | Literal["rule"] = DEFAULT_KEEP if self.keep is None else self.keep
        if self.adaptive or self.ratio is not None or self.compat == "released":
            keep = "rule"
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=keep, score=rule, compat=self.compat))
