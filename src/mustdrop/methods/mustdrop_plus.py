"""mustdrop+: merging or distinctness, diverse filters, eviction."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mustdrop.constants import constant, highest
from mustdrop.errors import ConfigError
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.methods.tome import SoftMatching
from mustdrop.methods.vcast import CurvedFrames
from mustdrop.pruners import (
    DecodeCachePruner,
    Features,
    InnerRule,
    PrefillPruner,
    Read,
    Seen,
    Selection,
    TextScorer,
    VisionRule,
    VisionStagePruner,
)
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision import Taper
from mustdrop.pruners.vision_rules import Comparing
from mustdrop.pruners.weighing import ImportanceKnob
from mustdrop.rules.diversity import greedy_determinant
from mustdrop.rules.dual_attention import dual_score, dual_statistics
from mustdrop.rules.geometry import around_mean, distinctiveness
from mustdrop.rules.ranking import keep_best

# Of 32 layers; early, because what passes them is paid for in all later layers.
LAYERS = (4, 12)
# What the last filter leaves of what enters, by budget: searched at and below 1/9; above, as little as keeps the FLOPs
# at those of merging alone (docs/quality.md).
TAPER = ((1 / 9, 0.2), (2 / 9, 0.52), (1 / 3, 0.73), (1 / 2, 0.9))
# A protected token outweighs every other one: a quality is at most 1, and what a pick leaves unexplained is at
# least 1e-5.
PROTECTED = 1e3


class AttendedAndDiverse(Comparing, TextScorer):
    """Tokens that the text attends to and that differ from each other: a determinantal process over dual attention.

    A ranking takes the best token and then its neighbours, which say the same. Here each pick multiplies the
    determinant of quality x cosine x quality by as much as possible (`mustdrop.rules.diversity.greedy_determinant`),
    where the quality is MustDrop's dual attention as a share of the row's highest, to a power, and cosines are those of
    the hidden states. So eight digits that a question counts keep a token each.

    Attributes:
        power: of the quality: 0 is diversity alone, a large one the ranking.
        geometry: how hidden states are compared; but for "raw", around the mean of the row's vision tokens, and the
            quality is multiplied with how distinct a token is.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"hidden"})

    power: float = Field(0.5, ge=0)

    def score(self, seen: Seen) -> Tensor:
        """(B, n) dual attention."""
        return dual_score(dual_statistics(seen.attention, seen.alive))

    def choose(
        self, seen: Seen, count: Tensor, protected: Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """See `TextScorer.choose`."""
        if seen.hidden is None:
            raise ConfigError("AttendedAndDiverse compares hidden states: call filter() with Seen(hidden=...).")
        score = self.score(seen)  # 0 where nothing is alive
        quality = (score / score.amax(1, keepdim=True).clamp(min=1e-30)).clamp(min=1e-6) ** self.power
        if self.geometry != "raw":
            quality = quality * distinctiveness(seen.hidden, self.geometry, seen.alive)
        must = None
        if protected is not None:
            must = keep_best(score, count, seen.alive & protected, protected, importance)
            quality = quality.masked_fill(must, PROTECTED)
        most = highest(count) if seen.most is None else seen.most
        hidden = around_mean(seen.hidden, self.geometry, seen.alive)
        picks = greedy_determinant(hidden, quality, most, seen.alive, count)
        # earlier picks rank higher; protected tokens that others explain wholly stay all the same
        n = score.shape[1]
        rank = torch.zeros(picks.shape[0], n + 1, dtype=torch.float32, device=score.device)
        order = constant(
            ("count down", most),
            score.device,
            lambda: torch.arange(most, 0, -1.0, dtype=torch.float32, device=score.device),
        )
        rank = rank.scatter_(1, picks % (n + 1), order.expand_as(picks))[:, :-1]  # -1: one place too many, cut off
        return keep_best(rank, count, seen.alive, must)


class MergedOrSelected(Comparing, InnerRule):
    """Tokens merge inside the encoder's layers and after them; where the layers cannot, a rule chooses after it.

    An encoder of packed patches, or one whose features are made of several patches, cannot merge in its layers. Merging
    after it blurs what it has read: the mean of two characters is neither of them.

    Attributes:
        share: largest share of its tokens that a layer merges, see `SoftMatching`.
        geometry: how what merges is compared, see there.
        rule: after an encoder that has not merged; one that reads no question.
    """

    by_view: ClassVar[bool] = False
    space: ClassVar[Literal["encoder", "language"]] = "encoder"
    per_head: ClassVar[bool] = True
    share: float = Field(0.5, gt=0, le=0.5)
    rule: VisionRule = CurvedFrames()

    @property
    def reads(self) -> tuple[Read, ...]:
        """What the rule reads."""
        return self.rule.reads

    @functools.cached_property
    def matching(self) -> SoftMatching:
        """What merges in the layers."""
        return SoftMatching(share=self.share, weighs=self.weighs, geometry=self.geometry)

    def amounts(self, patches: int, target: int, layers: int) -> list[int]:
        """See `InnerRule.amounts`."""
        return self.matching.amounts(patches, target, layers)

    def join(self, keys: Tensor, number: int, protected: int) -> tuple[Tensor, int]:
        """See `InnerRule.join`."""
        return self.matching.join(keys, number, protected)

    def join_uneven(self, keys: Tensor, numbers: Tensor, lengths: Tensor, protected: int) -> Tensor:
        """See `InnerRule.join_uneven`."""
        return self.matching.join_uneven(keys, numbers, lengths, protected)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`."""
        return (self.rule if seen.size is None else self.matching).choose(seen, count)


class MustDropPlus(Comparing, Recipe):
    """Merging or a choice in the encoder, an attended and diverse choice in the prefill, output-aware eviction.

    How the stages share the budget was searched on training scenes of the first bundled model, and what comes behind a
    packed encoder on pages of the second (docs/quality.md).

    Attributes:
        keep: average retained tokens per layer, int or share.
        taper: share of the tokens that enter which the last filter leaves, in (0, 1], or points (budget as a share,
            that share). The larger the budget, the less a choice for the question can win.
        merge: largest share of its tokens that an encoder layer merges, in (0, 1/2]; what is left over merges after
            the encoder.
        behind: what becomes of the features of an encoder whose layers cannot merge: "choose" keeps those that stand
            out of their frame (the rule of `vcast`); "merge" merges them, as the first edition did.
        power: of the attention in the filter's choice; 0 is diversity alone.
        layers: filter layers; None is (4, 12) of 32, scaled to the model.
        key_share: share of the tokens that the filter may not drop.
        importance: what these are: "attention" of the encoder; or in its place the likeness with the "question", what
            is "distinct" from the mean, the folder of a scorer, a module, or an `Importance` of your own.
        proportional: whether a merged token's attention in the encoder is weighed with its size; it takes an encoder
            without flash attention.
        decode_keep: vision entries per layer that stay in the cache while decoding; None keeps what the filter left.
        interval: decode steps between two evictions.
        geometry: how what merges in the encoder, and what the filter chooses from, is compared: "raw" as it is,
            "centered" around its mean, "standardized" around it and with channels of equal variance. Except for "raw",
            the filter multiplies attention with how distinct a token is.
    """

    called: ClassVar[str | None] = "mustdrop+"
    keep: Budget = DEFAULT_KEEP
    taper: Taper = TAPER
    merge: float = Field(0.3, gt=0, le=0.5)
    behind: Literal["choose", "merge"] = "choose"
    power: float = Field(0.5, ge=0)
    layers: tuple[int, ...] | None = None
    key_share: float = Field(0.0, ge=0, le=1)
    importance: ImportanceKnob = "attention"
    proportional: bool = True
    decode_keep: Budget | None = None
    interval: int = Field(8, ge=1)

    @classmethod
    def unbiased(cls) -> dict[str, Any]:
        """Merged tokens weigh like others."""
        return {"proportional": False}

    def build(self) -> Method:
        """Fill all three sockets."""
        rule = MergedOrSelected(share=self.merge, weighs=self.proportional, geometry=self.geometry)
        score = rule if self.behind == "choose" else rule.matching
        return Method(
            vision=VisionStagePruner(
                window=None,
                key_share=self.key_share,
                key_importance=self.importance,
                taper=self.taper,
                score=score,
            ),
            prefill=PrefillPruner(
                layers=self.layers,
                paper_layers=LAYERS,
                keep=self.keep,
                score=AttendedAndDiverse(power=self.power, geometry=self.geometry),
            ),
            decode=DecodeCachePruner(keep=self.decode_keep, interval=self.interval),
        )
