"""What a cache pruner calls to rank the entries of a layer: a small frozen object, in the file of its method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mustdrop.pruners.base import Settings
from mustdrop.rules.scores import neighbour_mean


@dataclass(frozen=True)
class Received:
    """Attention that some query rows gave to the n entries of one cache layer.

    Attributes:
        given: (B, n) float32, head-mean softmax probability, summed over the rows that were read.
        queries: (B, n) float32, how many of these rows see the entry.
    """

    given: Tensor
    queries: Tensor

    @property
    def mean(self) -> Tensor:
        """(B, n) mean over the rows that see the entry, 0 where none does."""
        return self.given / self.queries.clamp(min=1)

    def __add__(self, other: Received) -> Received:
        """What both kinds of rows gave."""
        return Received(self.given + other.given, self.queries + other.queries)


class CacheScorer(Settings):
    """Base of the scorers of the decode stage: all text after the last image, its mean; subclass, and change a part.

    Batch rows are independent: `gather` and `score` get those of several layers at once.

    Attributes:
        reads_prompt: whether rows of the prompt are read, in every layer of the prefill. If not, only generated tokens
            rank.
        by_row: whether the rows must be seen one by one; `gather` gets them.
        by_layer: whether `budgets` gives layers different numbers of entries.
    """

    reads_prompt: ClassVar[bool] = True
    by_row: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False

    def rows(self, text: Tensor, prompt: Tensor) -> Tensor:
        """Which rows of the prompt are read, (B, n) bool.

        Args:
            text: (B, n) bool, text after the last vision token; without such, the last token.
            prompt: (B, n) bool, all tokens that are left in this layer, without padding.
        """
        return text

    def gather(self, attention: Tensor, own: Tensor) -> Tensor:
        """`Received.given` from the rows one by one, where `by_row`.

        Args:
            attention: (B, R, n) float32, head-mean probability; rows of padding are zero.
            own: (B, R) long, the entry of each row's own token, -1 on padding.
        """
        return attention.sum(1)

    def add(self, known: Received, step: Received) -> Received:
        """What is known of a layer after one more decode step: here the sum.

        Args:
            known: until now.
            step: attention of the tokens of this step.
        """
        return known + step

    def score(self, read: Received, vision: Tensor) -> Tensor:
        """(B, n) float32, higher stays; `vision` (B, n) bool marks the entries that can leave."""
        return read.mean

    def budgets(self, mass: Tensor, count: Tensor, entries: Tensor) -> Tensor:
        """How many vision entries each layer keeps, (L, B) long, where `by_layer`.

        Args:
            mass: (L, B) float32, attention that the rows read gave to all vision entries of a layer.
            count: (B,) long, entries to keep, in the mean over the layers.
            entries: (L, B) long, vision entries that a layer has.
        """
        raise NotImplementedError


class GeneratedRows(CacheScorer):
    """Attention of the generated tokens, summed: what ranks where no scorer is named."""

    reads_prompt: ClassVar[bool] = False

    def score(self, read: Received, vision: Tensor) -> Tensor:
        """(B, n) sum."""
        return read.given


class ObservationWindow(CacheScorer):
    """Mean attention of the last text rows of the prompt, smoothed along the vision entries.

    Source: SnapKV (arXiv 2404.14469).

    Attributes:
        window: how many text rows, from the last one on; None reads all text after the last image.
        kernel: entries over which an average slides, odd; 1 smooths nothing.
        decay: where entries leave while decoding, the weight that a step leaves to what was known before (an
            exponential moving average).
    """

    window: int | None = Field(None, ge=1)
    kernel: int = Field(5, ge=1)
    decay: float = Field(0.9, ge=0, lt=1)

    def rows(self, text: Tensor, prompt: Tensor) -> Tensor:
        """The last `window` of the text rows."""
        return text if self.window is None else last_of(text, self.window)

    def add(self, known: Received, step: Received) -> Received:
        """Moving average."""
        mean = self.decay * known.mean + (1 - self.decay) * step.mean
        return Received(mean, torch.ones_like(mean))

    def score(self, read: Received, vision: Tensor) -> Tensor:
        """(B, n) pooled mean. Heads are averaged before pooling, which for an average is the same."""
        return neighbour_mean(read.mean, vision, self.kernel)


class AllRows(CacheScorer):
    """Mean attention of every query that sees the entry, those of generated tokens included.

    Source: accumulated attention of H2O (arXiv 2306.14048). The plain sum favours early entries, which more queries
    see; the division by their number takes that away.
    """

    def rows(self, text: Tensor, prompt: Tensor) -> Tensor:
        """All."""
        return prompt


class LastQuery(CacheScorer):
    """Attention of the newest query alone. Source: TOVA (arXiv 2401.06104)."""

    def rows(self, text: Tensor, prompt: Tensor) -> Tensor:
        """The last token of the prompt."""
        return last_of(text, 1)

    def add(self, known: Received, step: Received) -> Received:
        """The step alone."""
        return step


def last_of(mask: Tensor, count: int) -> Tensor:
    """The last `count` True entries of each row of `mask` (B, n)."""
    behind = mask.flip(1).cumsum(1).flip(1)
    return mask & (behind <= count)
