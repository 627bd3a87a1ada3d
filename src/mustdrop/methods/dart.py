"""DART: what duplicates a few pivots goes, whatever is attended to (arXiv 2502.11494)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mustdrop.constants import on_host
from mustdrop.errors import ConfigError
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import PrefillPruner, Seen, TextScorer
from mustdrop.pruners.base import Budget
from mustdrop.rules.ranking import keep_best


class Duplication(TextScorer):
    """Keep pivots among the vision tokens, and for each pivot the tokens that resemble it least.

    A choice, not a ranking: pivots choose in turn among what is left, those of the image first, then those of the text,
    each by falling key norm. Every one takes ceil((count - image pivots) / pivots) tokens until `count` are there.

    Attributes:
        image_pivots: vision tokens of the largest key norm (L1, all heads); they stay.
        text_pivots: text tokens after the last image of the largest key norm.
    """

    rows: ClassVar[Literal["text", "last", "none"]] = "none"
    reads: ClassVar[frozenset[str]] = frozenset({"keys", "hidden"})

    image_pivots: int = Field(4, ge=0)
    text_pivots: int = Field(4, ge=0)

    @property
    def pivots(self) -> int:
        """Both kinds."""
        return self.image_pivots + self.text_pivots

    def choose(
        self, seen: Seen, count: Tensor, pinned: Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """See `TextScorer.choose`."""
        if seen.keys is None or seen.hidden is None:
            raise ConfigError("DART compares keys and hidden states: call filter() with Seen(keys=..., hidden=...).")
        norm, unit = seen.keys.float().abs().sum(2), F.normalize(seen.hidden.float(), dim=2)
        first = keep_best(norm, torch.full_like(count, self.image_pivots), seen.alive)
        stay = first if pinned is None else first | (pinned & seen.alive)
        stay = keep_best(norm, count, stay, pinned, importance)
        text = torch.zeros_like(seen.alive) if seen.text is None else seen.text & ~seen.alive
        rated = keep_best(norm, torch.full_like(count, self.text_pivots), text)
        for b, wanted in enumerate(on_host(count).tolist()):
            pivots = torch.cat([_falling(norm[b], (first & stay)[b]), _falling(norm[b], rated[b])])
            if not len(pivots):  # a prompt without text, and no pivots among the image
                pivots = _falling(norm[b], seen.alive[b])[:1]
            self._grow(stay[b], seen.alive[b], unit[b] @ unit[b, pivots].T, wanted)
        return stay

    @staticmethod
    def _grow(stay: Tensor, alive: Tensor, similarity: Tensor, wanted: int) -> None:
        """Let each pivot, a column of `similarity` (n, pivots), take its share, until `wanted` tokens are in `stay`."""
        wanted = min(wanted, int(alive.sum()))
        share = -(-(wanted - int(stay.sum())) // max(1, similarity.shape[1]))
        for column in similarity.unbind(1):
            left = alive & ~stay
            take = min(share, wanted - int(stay.sum()), int(left.sum()))
            order = column.double().masked_fill(~left, torch.inf).argsort(stable=True)
            stay[order[:take]] = True


def _falling(norm: Tensor, mask: Tensor) -> Tensor:
    """Indices where `mask`, by falling norm; ties to the lower one."""
    index = mask.nonzero()[:, 0]
    return index[norm[index].argsort(descending=True, stable=True)]


class DART(Recipe):
    """Drop, once and early, the vision tokens that resemble the pivots; reads no attention.

    Attributes:
        keep: equal-token budget, int or share.
        layer: K, the first layer that runs on fewer tokens.
        image_pivots: pivots among the vision tokens.
        text_pivots: pivots among the text.
    """

    keep: Budget = DEFAULT_KEEP
    layer: int = Field(2, ge=1)
    image_pivots: int = Field(4, ge=0)
    text_pivots: int = Field(4, ge=0)

    def build(self) -> Method:
        """Only the prefill socket is filled."""
        if not self.image_pivots + self.text_pivots:
            raise ConfigError("dart needs a pivot to compare with: image_pivots and text_pivots are both 0.")
        score = Duplication(image_pivots=self.image_pivots, text_pivots=self.text_pivots)
        return Method(prefill=PrefillPruner(layers=(self.layer - 1,), keep=self.keep, score=score))
