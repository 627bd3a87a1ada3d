"""VScan: global and local scans, merging (arXiv 2505.22654)."""

from __future__ import annotations

import math

import torch
from pydantic import Field

from mustdrop import kernels
from mustdrop.indices import take
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, LastRow, PrefillPruner, Read, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.pruners.weighing import ImportanceKnob, WeighingRule, importance_of
from mustdrop.rules.groups import rank_in_group, windows

# The paper's encoder layers, of the 23 that run up to the one that LLaVA reads.
SHALLOW, DEPTH = 5, 23
# The paper cuts before layer 16 of 32: after layer 15.
LAYERS = (15,)
# 96 tokens enter for a budget of 64, and the cut leaves 32 of them.
TAPER = 1 / 3


class TwoScans(ComparingRule, WeighingRule):
    """Half is the best of each window by a shallow layer, the rest the best of the picture by a deep one.

    What is not kept joins the kept feature that resembles it most, which becomes the mean.

    Attributes:
        importance: what the scan of the picture goes by; the paper's is the attention of the deep layer.
        window: side of the windows, in features.
        local: share of what stays that the windows choose, in [0, 1].
        layer: encoder layer of the window scan, as for an encoder of 23 layers.
    """

    window: int = Field(6, ge=1)
    local: float = Field(0.5, ge=0, le=1)
    layer: int = Field(SHALLOW, ge=0, lt=DEPTH)

    @property
    def reads(self) -> tuple[Read, ...]:
        """Attention of the shallow layer, what the importance reads, and what is compared."""
        return tuple(dict.fromkeys((Read(layer=self.layer, of=DEPTH), *super().reads)))

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`. What does not divide by the windows goes to those with the strongest candidates."""
        shallow, deep = seen.of(self.reads[0]), self.weighed(self.importance.score(seen).float(), seen)
        assert count is not None
        kept = torch.zeros_like(shallow, dtype=torch.bool)
        best = shallow.argsort(dim=1, descending=True, stable=True)
        # all windows' best features come before all second best ones, and so on
        ranks = rank_in_group(shallow, windows(seen.frame, seen.row, seen.column, self.window))
        order = best.gather(1, ranks.gather(1, best).argsort(dim=1, stable=True))
        local = order[:, : math.floor(count * self.local + 1e-9)]
        kept.scatter_(1, local, True)
        everywhere = deep.masked_fill(kept, torch.inf).argsort(dim=1, descending=True, stable=True)
        keep = everywhere[:, :count].sort(1).values
        return Selection.merged(keep, nearest(self.centred(seen), keep))


def nearest(values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """(B, N) long, column of `keep` (B, M) that each feature (B, N, C) resembles most; a kept one, its own."""
    _, into = kernels.best_match(values, take(values, keep, 1, padded=False))
    return into.scatter(1, keep, torch.arange(keep.shape[1], dtype=torch.long, device=keep.device).expand_as(keep))


class VScan(Comparing, Recipe):
    """Scan windows and the whole picture, merge the rest, and cut once in the middle by the last word's attention.

    Attributes:
        keep: average retained tokens per layer of both stages, int or share. The cut leaves a third of what enters, so
            that with the paper's layers one and a half times the budget enters and half of it stays.
        window: side of the windows of the local scan, in features.
        local: share of what enters that the local scan chooses.
        layer: encoder layer of the local scan, as for an encoder of 23 layers; it is scaled to the model.
        layers: layer of the language model after which the cut is made; None is (15,) of 32, scaled to the model.
        taper: share of the tokens that enter which the cut leaves.
        importance: what the scan of the picture goes by: "attention" of the encoder's deep layer; or in its place the
            likeness with the "question", what is "distinct" from the mean, the folder of a scorer, a module, or an
            `Importance` of your own.
    """

    keep: Budget = DEFAULT_KEEP
    window: int = Field(6, ge=1)
    local: float = Field(0.5, ge=0, le=1)
    layer: int = Field(SHALLOW, ge=0, lt=DEPTH)
    layers: tuple[int, ...] | None = None
    taper: float = Field(TAPER, gt=0, le=1)
    importance: ImportanceKnob = "attention"

    def build(self) -> Method:
        """Vision and prefill socket share the budget."""
        weighed = importance_of(self.importance)
        rule = TwoScans(
            importance=weighed, window=self.window, local=self.local, layer=self.layer, geometry=self.geometry
        )
        return Method(
            vision=VisionStagePruner(window=None, key_share=0, score=rule, taper=self.taper),
            prefill=PrefillPruner(layers=self.layers, paper_layers=LAYERS, keep=self.keep, score=LastRow()),
        )
