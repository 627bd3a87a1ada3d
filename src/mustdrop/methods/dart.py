"""DART: duplicates of pivot tokens leave (arXiv 2502.11494)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mustdrop.errors import ConfigError
from mustdrop.indices import take
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import PrefillPruner, Seen, TextScorer
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import Comparing
from mustdrop.rules.geometry import around_mean
from mustdrop.rules.ranking import keep_best


class Duplication(Comparing, TextScorer):
    """Keep pivots among the vision tokens, and for each pivot the tokens that resemble it least.

    A choice, not a ranking: pivots choose in turn among what is left, those of the image first, then those of the text,
    each by falling key norm. Every one takes ceil((count - image pivots) / pivots) tokens until `count` are there.

    Attributes:
        image_pivots: vision tokens of the largest key norm (L1, all heads); they stay.
        text_pivots: text tokens after the last image of the largest key norm.
        geometry: how hidden states are compared; the mean, of text pivots too, is that of the row's vision tokens. Key
            norms are those of the keys as they are.
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
        self, seen: Seen, count: Tensor, protected: Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """See `TextScorer.choose`."""
        if seen.keys is None or seen.hidden is None:
            raise ConfigError("DART compares keys and hidden states: call filter() with Seen(keys=..., hidden=...).")
        norm = seen.keys.float().abs().sum(2)
        unit = F.normalize(around_mean(seen.hidden.float(), self.geometry, seen.alive), dim=2)
        first = keep_best(norm, torch.full_like(count, self.image_pivots), seen.alive)
        stay = first if protected is None else first | (protected & seen.alive)
        stay = keep_best(norm, count, stay, protected, importance)
        text = torch.zeros_like(seen.alive) if seen.text is None else seen.text & ~seen.alive
        rated = keep_best(norm, torch.full_like(count, self.text_pivots), text)
        falling = [
            _falling(norm, first & stay, self.image_pivots),
            _falling(norm, rated, self.text_pivots),
            _falling(norm, seen.alive, 1),  # for a prompt without text, and no pivots among the image
        ]
        pivots, real = (torch.cat(parts, 1) for parts in zip(*falling, strict=True))
        real[:, -1] &= ~real[:, :-1].any(1)
        similarity = unit @ take(unit, pivots, 1, padded=False).transpose(1, 2)
        return _grown(stay, seen.alive, similarity, real, count)


def _grown(stay: Tensor, alive: Tensor, similarity: Tensor, real: Tensor, count: Tensor) -> Tensor:
    """(B, n) bool: each pivot has taken its share of what was left, until `count` tokens of each row were in.

    Args:
        stay: (B, n) bool, what is in already.
        alive: (B, n) bool, candidates.
        similarity: (B, n, P) to each pivot; the least similar come first.
        real: (B, P) bool, pivots that are some.
        count: (B,) long.
    """
    wanted = torch.minimum(count, alive.sum(1))
    number = real.sum(1).clamp(min=1)
    share = (wanted - stay.sum(1) + number - 1).div(number, rounding_mode="floor")
    for column, some in zip(similarity.unbind(2), real.unbind(1), strict=True):
        left = alive & ~stay
        take = torch.minimum(share, wanted - stay.sum(1)) * some
        order = column.double().masked_fill(~left, torch.inf).argsort(dim=1, stable=True)
        place = torch.arange(order.shape[1], dtype=torch.long, device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, place)
        stay = stay | (left & (rank < take[:, None]))
    return stay


def _falling(norm: Tensor, mask: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(B, most) long and bool: entries of `mask` by falling norm, ties to the lower one, and which of them are some."""
    index = norm.double().masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :most]
    return index, mask.gather(1, index)


class DART(Comparing, Recipe):
    """Drop, once and early, the vision tokens that resemble the pivots; reads no attention.

    Attributes:
        keep: average retained tokens per layer, int or share.
        layer: K, the first layer that runs on fewer tokens.
        image_pivots: pivots among the vision tokens.
        text_pivots: pivots among the text.
        geometry: how hidden states are compared: "raw" as they are, "centered" around the mean of the prompt's vision
            tokens, "standardized" around it and with channels of equal variance.
    """

    keep: Budget = DEFAULT_KEEP
    layer: int = Field(2, ge=1)
    image_pivots: int = Field(4, ge=0)
    text_pivots: int = Field(4, ge=0)

    def build(self) -> Method:
        """Only the prefill socket is filled."""
        if not self.image_pivots + self.text_pivots:
            raise ConfigError("dart needs a pivot to compare with: image_pivots and text_pivots are both 0.")
        score = Duplication(image_pivots=self.image_pivots, text_pivots=self.text_pivots, geometry=self.geometry)
        return Method(prefill=PrefillPruner(layers=(self.layer - 1,), keep=self.keep, score=score))
