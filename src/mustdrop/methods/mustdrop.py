"""MustDrop: window merging, text-guided filters, cache cut (arXiv 2411.10803)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mustdrop.errors import ConfigError
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.pruners.base import Budget, Compat
from mustdrop.pruners.vision_rules import Comparing
from mustdrop.pruners.weighing import ImportanceKnob


class MustDrop(Comparing, Recipe):
    """Merge similar neighbours in the encoder, filter by dual attention in the prefill, cut the cache for decoding.

    Attributes:
        keep: average retained tokens per layer, int or share; one third without thresholds and rank rule.
        global_threshold: gamma of the dual filter, together with `individual_threshold`.
        individual_threshold: alpha of the dual filter.
        scale: rank rule, tokens per unit of rank (the `--scale` of the authors' first read-me).
        bias: rank rule, tokens on top (`--bias`).
        layers: filter layers; None is (2, 6, 10, 14) of 32, scaled to the model.
        window: side of the merging windows.
        merge: how many windows merge: "budget", which follows from the prompt's shape, or "threshold", which the data
            decide (see `VisionStagePruner.merge_count`); None: "budget" where `keep` is a number and no `threshold` is
            given.
        merge_share: share of the windows that "budget" merges at most.
        threshold: similarity from which a window merges.
        geometry: how the tokens of a window are compared: "raw" as they are, "centered" around the mean of the picture
            (of a video's frame, where an encoder sees frames one by one), "standardized" around it and with channels of
            equal variance. `threshold` is then one of these cosines.
        key_share: share of protected tokens.
        importance: what they are protected by: "attention" of the encoder; or in its place the likeness with the
            "question", what is "distinct" from the mean, the folder of a scorer, a module, or an `Importance` of your
            own.
        inside: whether windows also merge inside an encoder of packed patches, which then runs on fewer; False merges
            the features that it gives.
        select_layer: encoder layer after which the tokens that cannot enter under the budget leave an encoder of packed
            patches; its attention also says which are protected. None: they leave after it.
        decode_keep: vision entries per layer that stay in the cache while decoding; None keeps all after the cut.
        interval: decode steps between two evictions.
        old_pictures: entries per layer that remain of each picture of a chat once a later turn has brought a newer one.
        compat: "released" reproduces the authors' code decision by decision.
    """

    keep: Budget | None = None
    global_threshold: float | None = None
    individual_threshold: float | None = None
    scale: float | None = None
    bias: float | None = None
    layers: tuple[int, ...] | None = None
    window: int | None = Field(3, ge=2)
    merge: Literal["budget", "threshold"] | None = None
    merge_share: float = Field(0.5, gt=0, le=1)
    threshold: float = 0.8
    key_share: float = 0.08
    importance: ImportanceKnob = "attention"
    inside: bool = True
    select_layer: int | None = None
    decode_keep: Budget | None = None
    interval: int = 8
    old_pictures: Budget | None = None
    compat: Compat = "paper"

    def build(self) -> Method:
        """Fill all three sockets."""
        data_decide = any(v is not None for v in (self.global_threshold, self.scale, self.bias))
        if self.compat == "released" and not data_decide and self.keep is None:
            raise ConfigError(
                'compat="released" needs global_threshold= and individual_threshold=, or scale= and bias=: '
                "the authors' code has no default that drops anything. docs/fidelity.md lists the published thresholds."
            )
        return Method(
            vision=VisionStagePruner(
                window=self.window,
                merge_count=self._merge_count(data_decide),
                merge_share=self.merge_share,
                threshold=self.threshold,
                geometry=self.geometry,
                key_share=self.key_share,
                key_importance=self.importance,
                key_layer=-1 if self.select_layer is None else self.select_layer,
                inside=self.inside,
                select_layer=self.select_layer,
                compat=self.compat,
            ),
            prefill=PrefillPruner(
                layers=self.layers,
                keep=DEFAULT_KEEP if self.keep is None and not data_decide else self.keep,
                global_threshold=self.global_threshold,
                individual_threshold=self.individual_threshold,
                scale=self.scale,
                bias=self.bias,
                compat=self.compat,
            ),
            decode=DecodeCachePruner(keep=self.decode_keep, interval=self.interval, old_pictures=self.old_pictures),
        )

    def _merge_count(self, data_decide: bool) -> Literal["budget", "threshold"]:
        """How many windows merge; a threshold that somebody names is meant."""
        if self.merge is not None:
            return self.merge
        named = "threshold" in self.model_fields_set
        return "threshold" if data_decide or named or self.compat == "released" else "budget"
