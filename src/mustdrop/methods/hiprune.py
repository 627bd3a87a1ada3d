"""HiPrune: attention of middle and deep layers (arXiv 2508.00553)."""

from __future__ import annotations

import torch
from pydantic import Field

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Read, Selection, VisionRule, VisionStagePruner
from mustdrop.pruners.base import Budget

# The paper's encoder layers ("layer 9" and the one that features are read from), of the 23 that LLaVA runs.
MIDDLE, DEEP, DEPTH = 8, 22, 23
# An anchor and its four neighbours.
CROSS = 5


class AnchorsBuffersRegisters(VisionRule):
    """Anchors receive most in a middle layer, buffers lie beside them, registers receive most in a deep layer.

    Attributes:
        alpha: share of what stays that anchors and buffers may take, in [0, 1].
        layer: the middle layer, as for an encoder of 23 layers.
    """

    alpha: float = Field(0.1, ge=0, le=1)
    layer: int = Field(MIDDLE, ge=0, lt=DEPTH)

    @property
    def reads(self) -> tuple[Read, ...]:
        """What each patch receives in the middle and in the deep layer, also where there is a CLS token."""
        return Read(what="received", layer=self.layer, of=DEPTH), Read(what="received", layer=DEEP, of=DEPTH)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`."""
        middle, deep = (seen.of(read) for read in self.reads)
        assert count is not None
        anchors = min(round(count * self.alpha / CROSS), count // CROSS)
        anchor = middle.argsort(dim=1, descending=True, stable=True)[:, :anchors]
        return Selection.best(deep.masked_fill(self._crosses(seen, anchor), torch.inf), count)

    def _crosses(self, seen: Features, anchor: torch.Tensor) -> torch.Tensor:
        """(B, N) bool, the anchors (B, A) and the features above, below, left and right of them in their frame."""

        def away(where: torch.Tensor) -> torch.Tensor:
            return (where[:, None] - where.gather(1, anchor)[..., None]).abs()

        beside = (away(seen.row) + away(seen.column) <= 1) & (away(seen.frame) == 0)
        return beside.any(1)


class HiPrune(Recipe):
    """Anchors, buffers and registers by the attention that patches receive; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        alpha: share of `keep` that anchors and the buffers beside them may take.
        layer: encoder layer that names the anchors, as for an encoder of 23 layers; it is scaled to the model.
    """

    keep: Budget = DEFAULT_KEEP
    alpha: float = Field(0.1, ge=0, le=1)
    layer: int = Field(MIDDLE, ge=0, lt=DEPTH)

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = AnchorsBuffersRegisters(alpha=self.alpha, layer=self.layer)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
