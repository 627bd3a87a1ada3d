"""TGV-KV: text-guided budgets and scores (arXiv 2606.03075)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import CacheScorer, DecodeCachePruner, Received
from mustdrop.pruners.base import Budget
from mustdrop.rules.layer_budgets import proportional


class TextGuided(CacheScorer):
    """Attention of the text; a row weighs as much as the text after it attends to its token.

    The weight of text token j is the mean over the text rows i >= j of what i gives to j; weights add up to 1. What a
    layer's text gives to vision, in sum, is its share of the budget.
    """

    by_row: ClassVar[bool] = True
    by_layer: ClassVar[bool] = True

    def gather(self, attention: Tensor, own: Tensor) -> Tensor:
        """(B, n) weighted sum over the text rows."""
        real = own >= 0
        among = attention.gather(2, own.clamp(min=0)[:, None].expand(-1, own.shape[1], -1))  # row i, column j
        later = real.flip(1).cumsum(1).flip(1)  # rows i >= j that are no padding; those that are give nothing
        weight = torch.where(real, among.tril().sum(1) / later, 0.0)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (weight[:, :, None] * attention).sum(1)

    def score(self, read: Received, vision: Tensor) -> Tensor:
        """(B, n) the weighted sum."""
        return read.given

    def budgets(self, mass: Tensor, count: Tensor, entries: Tensor) -> Tensor:
        """In proportion to the mass."""
        return proportional(mass, count, entries)


class TGVKV(Recipe):
    """At the end of the prefill each layer's cache keeps as many vision entries as the text attends to it.

    All layers process all tokens of the prompt: the prefill costs what it costs without pruning (and the scores), and
    decode steps and the cache become cheaper.

    Attributes:
        keep: vision entries that stay in the cache, in the mean over the layers: int, or share of the prompt's vision
            tokens. The layers still process all of them.
    """

    keep: Budget = DEFAULT_KEEP

    def build(self) -> Method:
        """Only the decode socket is filled."""
        return Method(decode=DecodeCachePruner(keep=self.keep, score=TextGuided(), after_prefill=True))
