"""Decode stage: what leaves the KV cache, after the prefill and while the answer is written."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mustdrop.errors import ConfigError
from mustdrop.pruners.base import Budget, Settings
from mustdrop.pruners.cache_scorers import CacheScorer, GeneratedRows
from mustdrop.rules.ranking import keep_best
from mustdrop.selection import Selection

_GENERATED_ROWS = GeneratedRows()


class DecodeCachePruner(Settings):
    """Output-aware cache policy.

    At the end of the prefill the earlier layers' caches lose the vision tokens that later layers dropped. Then, if
    `keep` is set, the remaining vision entries of each layer are ranked, and the last ones leave the cache, down to
    `keep`: every `interval` decode steps, or once at the end of the prefill. Text entries always stay.

    Source: MustDrop (arXiv 2411.10803), decoding stage. The cut after the prefill is the released code's; it evicts
    nothing during generation (keep=None).

    Attributes:
        keep: vision entries per layer that remain while decoding (mean over the layers): int, or share of the prompt's
            vision tokens. None evicts nothing after the cut.
        interval: decode steps between two evictions.
        cascade: whether the earlier layers' caches are cut at the end of the prefill.
        full_layers: the first layers, which the cut leaves alone.
        score: how entries are ranked; None is the attention of the generated tokens.
        after_prefill: entries leave once, at the end of the prefill, and not while decoding. Needs a `score` that reads
            the prompt.
        old_pictures: entries per layer that remain of each picture (or video) of a chat once a later turn has brought a
            newer one: int, or share of the picture's tokens. `score` ranks them if it reads the prompt, else the
            attention of the newest question. Pictures that come in one turn are of one age. None leaves them alone.

    Raises:
        ConfigError, BudgetError, UnknownKnobError: on construction, see the message.
    """

    keep: Budget | None = None
    interval: int = Field(8, ge=1)
    cascade: bool = True
    full_layers: int = Field(2, ge=0)
    score: CacheScorer | None = None
    after_prefill: bool = False
    old_pictures: Budget | None = None

    @model_validator(mode="after")
    def _complete(self) -> DecodeCachePruner:
        if self.keep is None and (self.after_prefill or (self.score is not None and self.old_pictures is None)):
            raise ConfigError(
                "DecodeCachePruner.score and after_prefill say how entries leave, and keep=None says that none do: "
                "give keep=, or leave them out."
            )
        if self.keep is None and self.score is not None and not self.score.reads_prompt:
            raise ConfigError(
                f"DecodeCachePruner.old_pictures shrink at the end of a prefill, and {type(self.score).__name__} ranks "
                "by the generated tokens: give a score that reads the prompt, or leave it out."
            )
        if self.after_prefill and not self.scorer.reads_prompt:
            raise ConfigError(
                "DecodeCachePruner(after_prefill=True) cuts before a token is generated, and "
                f"{type(self.scorer).__name__} ranks by the generated tokens: give score=, e.g. "
                "score=ObservationWindow()."
            )
        if self.keep is not None and self.scorer.by_layer and not self.after_prefill:
            raise ConfigError(
                f"{type(self.scorer).__name__} splits the budget over the layers by what all of them read of the "
                "prompt: give after_prefill=True."
            )
        return self

    @property
    def scorer(self) -> CacheScorer:
        """What ranks."""
        return _GENERATED_ROWS if self.score is None else self.score

    @property
    def reads_prompt(self) -> bool:
        """Whether attention of the prompt is read, in every layer."""
        return self.keep is not None and self.scorer.reads_prompt

    @property
    def reads_steps(self) -> bool:
        """Whether attention of generated tokens is read, and entries leave while decoding."""
        return self.keep is not None and not self.after_prefill

    @property
    def reads_layers(self) -> bool:
        """Whether attention is read in every layer, at some time."""
        return self.keep is not None or self.old_pictures is not None

    def cuts(self, totals: list[int]) -> bool:
        """Whether vision entries must leave, of prompts with so many."""
        if self.keep is None:
            return False
        return self.keep < 1 if isinstance(self.keep, float) else any(n > self.keep for n in totals)

    def left_of(self, totals: Tensor) -> Tensor:
        """`old_pictures` as a number of entries per row, of a picture with `totals` (B,) tokens."""
        return _entries(self.old_pictures, totals)

    def counts(self, totals: Tensor) -> Tensor:
        """`keep` as a number of entries per row, for prompts with `totals` (B,) vision tokens."""
        return _entries(self.keep, totals)

    def due(self, step: int) -> bool:
        """Whether entries leave before decode step `step` (1 = the first one)."""
        return self.reads_steps and step > 1 and (step - 1) % self.interval == 0

    def __call__(self, attended: Tensor, vision: Tensor, count: Tensor | int) -> Selection:
        """Choose the cache entries of one layer that stay.

        Args:
            attended: (B, N) score of each entry, higher stays: without a scorer, the attention that the generated
                tokens gave it so far, summed over steps.
            vision: (B, N) bool, which entries are vision tokens; the others always stay.
            count: vision entries to keep, (B,) long or one int.

        Returns:
            `Selection` over the N entries, ascending.
        """
        count = torch.as_tensor(count, dtype=torch.long, device=attended.device).expand(attended.shape[0])
        return Selection.from_mask(keep_best(attended, count, vision) | ~vision)


def _entries(budget: int | float | None, totals: Tensor) -> Tensor:
    """(B,) long, a budget in entries, of `totals` (B,) tokens."""
    if budget is None:
        return totals
    if isinstance(budget, int):
        return totals.clamp(max=budget)
    return (totals * budget + 1e-6).long().clamp(min=1)
