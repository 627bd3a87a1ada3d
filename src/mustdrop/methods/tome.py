"""Token Merging (ToMe): bipartite merging in every layer (arXiv 2210.09461)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from mustdrop import kernels
from mustdrop.errors import ConfigError
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, InnerRule, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget, Compat
from mustdrop.pruners.vision_rules import Comparing
from mustdrop.rules import bipartite
from mustdrop.rules.geometry import around_mean


class SoftMatching(Comparing, InnerRule):
    """Bipartite soft matching, in the encoder's layers by their keys, and after it by the features themselves.

    Attributes:
        weighs: whether a merged token's attention is weighed with its size.
        number: tokens that merge in each layer (one for all, or one per layer, none in later layers); None spreads
            what the budget asks for.
        share: how it is spread: "even", as many in each layer, or a number: the same share of each layer's tokens,
            at most this one, up to 1/2. What is left over merges after the encoder.
        slope: with one number, -1 to 1: from (1 - slope) times it in the first layer to (1 + slope) in the last.
        geometry: how keys, and features after the layers, are compared: as they are, around the mean of those that may
            merge, or with channels of equal variance too. To attention, keys around their mean are the same keys: its
            softmax does not see what they have in common.
    """

    space: ClassVar[Literal["encoder", "language"]] = "encoder"
    per_head: ClassVar[bool] = True
    number: int | tuple[int, ...] | None = None
    share: Literal["even"] | Annotated[float, Field(gt=0, le=0.5)] = "even"
    slope: float = 0.0

    def amounts(self, patches: int, target: int, layers: int) -> list[int]:
        """See `InnerRule.amounts`."""
        if isinstance(self.number, tuple):
            return bipartite.of_list(self.number, layers)
        if self.number is not None:
            return bipartite.linear_amounts(self.number, self.slope, layers)
        if self.share == "even":
            return bipartite.amounts(patches, target, layers)
        return bipartite.geometric_amounts(patches, target, layers, self.share)

    def join(self, keys: Tensor, number: int, protected: int) -> tuple[Tensor, int]:
        """See `InnerRule.join`."""
        return bipartite.join(self.metric(keys, protected), number, protected)

    def join_uneven(self, keys: Tensor, numbers: Tensor, lengths: Tensor, protected: int) -> Tensor:
        """See `InnerRule.join_uneven`."""
        return kernels.bipartite_slots(self.metric(keys, protected, lengths), 0, protected, numbers, lengths)

    def metric(self, keys: Tensor, protected: int, lengths: Tensor | None = None) -> Tensor:
        """What is compared of the keys that `join` gets: these for "raw", else (B, N, D) around their mean."""
        if self.geometry == "raw":
            return keys
        mean = keys.float().mean(1) if keys.ndim == 4 else keys
        place = torch.arange(mean.shape[1], dtype=torch.long, device=mean.device).expand(mean.shape[:2])
        merges = place >= protected
        if lengths is not None:
            merges = merges & (place < lengths.to(mean.device)[:, None])
        return around_mean(mean, self.geometry, merges)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`: what the layers left is matched again, as often as it takes."""
        values, size, names = seen.values, seen.size, None
        moves: list[Tensor] = []
        while count is not None and values.shape[1] > count:
            into, slots = bipartite.join(around_mean(values, self.geometry), values.shape[1] - count)
            values, size, _, names = kernels.merge_sized(values, into, slots, size, names)
            moves.append(into)
        if names is None:
            names = torch.arange(values.shape[1], dtype=torch.long, device=values.device).expand(values.shape[:2])
        return Selection.merged(names, kernels.followed(moves) if moves else names, seen.size)


class ToMe(Comparing, Recipe):
    """Merge patches that resemble each other, step by step, in the vision encoder.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens; one third if `r` is not given.
        r: tokens that merge in each encoder layer (one for all, or one per layer), in place of `keep`. CLIP's layer
            that LLaVA reads has 576 - 23 r tokens.
        slope: with one `r`: -1 merges most in the first layers, 1 in the last.
        proportional: whether a merged token's attention is weighed with its size; it takes an encoder without
            flash attention.
        select_layer: encoder layer after which tokens merge, all at once, in an encoder of packed patches; None merges
            what such an encoder gives, and it saves nothing.
        geometry: how keys, and features after the layers, are compared: "raw" as they are, "centered" around their
            mean, "standardized" around it and with channels of equal variance.
        compat: "released" hands the tokens on in the order of the released code, with new positions; it has no `keep`.
    """

    keep: Budget | None = None
    r: NonNegativeInt | tuple[NonNegativeInt, ...] | None = None
    slope: float = Field(0.0, ge=-1, le=1)
    proportional: bool = True
    select_layer: int | None = None
    compat: Compat = "paper"

    @classmethod
    def unbiased(cls) -> dict[str, Any]:
        """Merged tokens weigh like others."""
        return {"proportional": False}

    def build(self) -> Method:
        """Only the vision socket is filled."""
        if self.keep is not None and self.r is not None:
            raise ConfigError(f"tome takes keep= or r=, got keep={self.keep} and r={self.r}: leave one out.")
        if self.compat == "released" and self.r is None:
            raise ConfigError('tome(compat="released") needs r=: the authors\' code has no budget.')
        keep: Budget | Literal["rule"] = DEFAULT_KEEP if self.keep is None else self.keep
        rule = SoftMatching(number=self.r, slope=self.slope, weighs=self.proportional, geometry=self.geometry)
        if self.r is not None:
            keep = "rule"
        stage = VisionStagePruner(
            window=None, key_share=0, keep=keep, score=rule, select_layer=self.select_layer, compat=self.compat
        )
        return Method(vision=stage)
