"""What a prefill pruner calls to rank vision tokens: a small frozen object, defined in the file of its method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from mustdrop.errors import ConfigError
from mustdrop.pruners import answers
from mustdrop.pruners.base import Settings
from mustdrop.rules.ranking import keep_best

# Pairs of tokens whose inner products may exist at once.
_PAIRS = 1 << 24


@dataclass(frozen=True)
class Seen:
    """What a filter layer knows, for the n rows that are left. Batch rows are padded on the left.

    Attributes:
        attention: (B, T, n) float32, head-mean softmax probability that scoring text row t gives to row n; padding rows
            are zero. The last row is the last token of the prompt.
        alive: (B, n) bool, the vision tokens.
        text: (B, n) bool, the text rows that score; None outside a model.
        keys: (B, n, G * D) keys of the layer, heads side by side, if the scorer reads them.
        hidden: (B, n, C) output of the layer after the model's final norm, if the scorer reads it.
        most: vision tokens that any row keeps at most, where the host knows it; None: ask `count`.
    """

    attention: Tensor
    alive: Tensor
    text: Tensor | None = None
    keys: Tensor | None = None
    hidden: Tensor | None = None
    most: int | None = None


class TextScorer(Settings):
    """Base of the scorers of the prefill stage: subclass, and write `score` (or `choose`).

    Attributes:
        rows: whose attention is read: all text "text", the last token of the prompt "last", or nobody's "none".
        reads: what beside attention is read: "keys", "hidden".
    """

    rows: ClassVar[Literal["text", "last", "none"]] = "text"
    reads: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _known(self) -> TextScorer:
        """What is read is something that can be."""
        if self.rows not in ("text", "last", "none") or not set(self.reads) <= {"keys", "hidden"}:
            raise ConfigError(
                f'{type(self).__name__}: expected rows "text", "last" or "none", and reads among {{"keys", "hidden"}}, '
                f"got rows={self.rows!r} and reads={self.reads!r}."
            )
        return self

    def raters(self, embeds: Tensor, vision: Tensor, text: Tensor) -> Tensor:
        """Which text tokens score, (B, S) bool, decided once before decoder layer 0; a subset of `text`.

        Args:
            embeds: (B, S, C) input of the text model.
            vision: (B, S) bool, vision tokens that enter.
            text: (B, S) bool, text after the last vision token.
        """
        return text

    def score(self, seen: Seen) -> Tensor:
        """(B, n) float32, higher stays."""
        raise NotImplementedError

    def choose(
        self, seen: Seen, count: Tensor, protected: Tensor | None = None, importance: Tensor | None = None
    ) -> Tensor:
        """(B, n) bool, the `count` (B,) long vision tokens of each row that stay.

        Args:
            seen: what the layer knows.
            count: tokens to keep.
            protected: (B, n) bool, tokens that come before all others.
            importance: (B, n), orders the protected ones.
        """
        return keep_best(answers.scores(self, seen), count, seen.alive, protected, importance)


class LastRow(TextScorer):
    """Attention of the last token of the prompt. Source: FastV (arXiv 2403.06764), PyramidDrop (arXiv 2410.17247)."""

    rows: ClassVar[Literal["text", "last", "none"]] = "last"

    def score(self, seen: Seen) -> Tensor:
        """(B, n) probability."""
        return seen.attention[:, -1]


class MeanOverText(TextScorer):
    """Mean attention of the text rows that score."""

    def score(self, seen: Seen) -> Tensor:
        """(B, n) probability."""
        real = (seen.attention.abs().sum(2) > 0).sum(1, keepdim=True).clamp(min=1)
        return seen.attention.sum(1) / real


class Raters(MeanOverText):
    """Mean attention of the text tokens that the picture resembles most.

    Source: SparseVLM (arXiv 2410.04417): softmax over the text of the inner products of the input embeddings, averaged
    over the vision tokens; a text token above the mean is a rater.
    """

    def raters(self, embeds: Tensor, vision: Tensor, text: Tensor) -> Tensor:
        """Each batch row by itself, so that padding changes nothing. Text that is all alike stays as it is."""
        x = embeds.float()
        length, total = x.shape[1], x.new_zeros(text.shape)
        at_once = max(1, _PAIRS // max(1, len(x) * length))
        for start in range(0, length, at_once):
            some = slice(start, start + at_once)
            affinity = (x[:, some] @ x.mT).masked_fill(~text[:, None], -torch.inf).softmax(2)
            total = total + affinity.masked_fill(~vision[:, some, None], 0.0).sum(1)
        total = total.masked_fill(~text, 0.0)
        above = text & (total > total.sum(1, keepdim=True) / text.sum(1, keepdim=True))
        return torch.where(above.any(1, keepdim=True), above, text)
