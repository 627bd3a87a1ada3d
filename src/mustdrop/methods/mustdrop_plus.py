"""mustdrop+: diverse features enter, the text filters them early, and the cache follows the answer."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.methods.divprune import MaxMinDiversity
from mustdrop.pruners import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.pruners.base import Budget

# One filter, this early in a decoder of 32 layers: what passes it is paid for in all layers behind.
LAYERS = (4,)


class MustDropPlus(Recipe):
    """Diversity at the vision stage, dual attention in the prefill, output-aware eviction while decoding.

    The split of the budget is a first choice, made on a few scenes of the bundled model's selection split. It has not
    been shown to be better than diversity alone.

    Attributes:
        keep: equal-token budget, int or share.
        taper: share of the tokens that enter which the text filter leaves, in (0, 1].
        layers: filter layers; None is (4,) of 32, scaled to the model.
        key_share: share of the tokens that the filter may not drop, by encoder attention.
        decode_keep: vision entries per layer that stay in the cache while decoding; None keeps what the filter left.
        interval: decode steps between two evictions.
    """

    called: ClassVar[str | None] = "mustdrop+"
    keep: Budget = DEFAULT_KEEP
    taper: float = Field(0.5, gt=0, le=1)
    layers: tuple[int, ...] | None = None
    key_share: float = Field(0.0, ge=0, le=1)
    decode_keep: Budget | None = None
    interval: int = Field(8, ge=1)

    def build(self) -> Method:
        """Fill all three sockets."""
        return Method(
            vision=VisionStagePruner(window=None, key_share=self.key_share, taper=self.taper, score=MaxMinDiversity()),
            prefill=PrefillPruner(layers=self.layers, paper_layers=LAYERS, keep=self.keep),
            decode=DecodeCachePruner(keep=self.decode_keep, interval=self.interval),
        )
