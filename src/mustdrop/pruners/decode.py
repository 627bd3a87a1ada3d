"""Decode stage: what leaves the KV cache, after the prefill and while the answer is written."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mustdrop.pruners.base import Budget, Settings
from mustdrop.rules.ranking import keep_best
from mustdrop.selection import Selection


class DecodeCachePruner(Settings):
    """Output-aware cache policy.

    At the end of the prefill the earlier layers' caches lose the vision tokens that later layers dropped. Then, if
    `keep`
    is set, attention of the generated tokens to the remaining vision entries is accumulated per layer, and every
    `interval` steps the least attended entries leave the cache, down to `keep`. Text entries always stay.

    Source: MustDrop (arXiv 2411.10803), decoding stage. The cut after the prefill is the released code's; it evicts
    nothing during generation (keep=None).

    Attributes:
        keep: vision entries per layer that remain while decoding: int, or share of the prompt's vision tokens. None
            evicts nothing after the cut.
        interval: decode steps between two evictions.
        cascade: whether the earlier layers' caches are cut at the end of the prefill.
        full_layers: the first layers, which the cut leaves alone.

    Raises:
        ConfigError, BudgetError, UnknownKnobError: on construction, see the message.
    """

    keep: Budget | None = None
    interval: int = Field(8, ge=1)
    cascade: bool = True
    full_layers: int = Field(2, ge=0)

    def counts(self, totals: Tensor) -> Tensor:
        """`keep` as a number of entries per row, for prompts with `totals` (B,) vision tokens."""
        if self.keep is None:
            return totals
        if isinstance(self.keep, int):
            return totals.clamp(max=self.keep)
        return (totals * self.keep + 1e-6).long().clamp(min=1)

    def due(self, step: int) -> bool:
        """Whether entries leave before decode step `step` (1 = the first one)."""
        return self.keep is not None and step > 1 and (step - 1) % self.interval == 0

    def __call__(self, attended: Tensor, vision: Tensor, count: Tensor | int) -> Selection:
        """Choose the cache entries of one layer that stay.

        Args:
            attended: (B, N) attention that the generated tokens gave to each entry so far, summed over steps.
            vision: (B, N) bool, which entries are vision tokens; the others always stay.
            count: vision entries to keep, (B,) long or one int.

        Returns:
            `Selection` over the N entries, ascending.
        """
        count = torch.as_tensor(count, device=attended.device).expand(attended.shape[0])
        return Selection.from_mask(keep_best(attended, count, vision) | ~vision)
