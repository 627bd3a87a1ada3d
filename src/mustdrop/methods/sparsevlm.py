"""SparseVLM: attention of visual words, recycling (arXiv 2410.04417)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from mustdrop.errors import ConfigError
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import PrefillPruner, Raters, Recycling
from mustdrop.pruners.base import Budget, Compat

# Layers of the released code for 32 layers: with a fixed number per stage (v1.5), and with the rank rule (v1).
LAYERS, RANK_LAYERS = (2, 6, 15), (2, 6, 15, 19)


class SparseVLM(Recipe):
    """Rank vision tokens by the mean attention of the rater words, and keep clusters of what is dropped.

    Attributes:
        keep: average retained tokens per layer, clusters counted, int or share; one third if nothing else says how
            many.
        scale: rank rule, tokens per unit of the attention matrix' rank (in place of `keep`).
        bias: rank rule, tokens on top.
        survivors: tokens kept at each filter layer, clusters not counted (the released lists, e.g. (300, 200, 110) for
            "192 tokens" of 576).
        layers: filter layers; None is (2, 6, 15) of 32, with the rank rule (2, 6, 15, 19), scaled to the model.
        recycle: share of the dropped tokens that is clustered; 0 recycles nothing.
        per_cluster: recycled tokens to a cluster.
        seed: of the noise that breaks ties in the released clustering.
        compat: "released" renumbers positions, and puts clusters after the kept tokens.
    """

    keep: Budget | None = None
    scale: float | None = None
    bias: float | None = None
    survivors: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    recycle: float = Field(0.3, ge=0, le=1)
    per_cluster: int = Field(10, ge=1)
    seed: int = 0
    compat: Compat = "paper"

    @classmethod
    def unmerged(cls) -> dict[str, Any]:
        """Without clusters."""
        return {"recycle": 0}

    def build(self) -> Method:
        """Only the prefill socket is filled."""
        rank = self.scale is not None or self.bias is not None
        free = not rank and self.survivors is None
        if self.compat == "released" and free and self.keep is None:
            raise ConfigError(
                'sparsevlm(compat="released") needs survivors= (e.g. (300, 200, 110)), or scale= and bias=: the '
                "authors' code has no other way to say how many tokens stay."
            )
        seed = self.seed if self.compat == "released" else None
        return Method(
            prefill=PrefillPruner(
                layers=self.layers,
                paper_layers=RANK_LAYERS if rank else LAYERS,
                keep=DEFAULT_KEEP if self.keep is None and free else self.keep,
                scale=self.scale,
                bias=self.bias,
                survivors=self.survivors,
                score=Raters(),
                recycle=Recycling(share=self.recycle, per_cluster=self.per_cluster, seed=seed)
                if self.recycle
                else None,
                compat=self.compat,
            )
        )
