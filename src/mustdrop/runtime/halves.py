"""Merging inside an encoder layer, between its attention and its MLP.

A layer computes x = h + attention(norm(h)) and then x + mlp(norm(x)). Its second norm is given the merged x, the MLP's
output is kept and replaced by a zero, and when the layer is done its output is replaced by merged x + MLP output. So no
layer's code is repeated here, and only the sum of the second half is made twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mustdrop import kernels
from mustdrop.adapters.base import Tower
from mustdrop.compat import eager
from mustdrop.errors import UnsupportedOptionError
from mustdrop.pruners import InnerRule
from mustdrop.runtime.state import Local
from mustdrop.runtime.tap import implementation_of
from mustdrop.selection import Selection


@dataclass
class Inside:
    """State of merging in one pass through an encoder.

    Attributes:
        rule: what merges.
        amounts: tokens that merge in each layer.
        prefix: tokens before the patches.
        size: (items, tokens) float, patches that each token stands for; None before anything has merged.
        keys: (items, tokens, D) of the layer that is running.
        mid: its tokens between the halves.
        out: its output.
    """

    rule: InnerRule
    amounts: list[int]
    prefix: int
    size: Tensor | None = None
    keys: Tensor | None = None
    mid: Tensor | None = None
    out: Tensor | None = None

    @classmethod
    def of(cls, rule: InnerRule, amounts: list[int], tower: Tower) -> Inside:
        """Merging of `amounts` tokens in the layers of a tower.

        Raises:
            UnsupportedOptionError: the rule weighs merged tokens, and the tower's attention takes no bias.
        """
        attention = implementation_of(tower.blocks[0])
        if rule.weighs and any(amounts) and ("flash" in attention or "flex" in attention):
            raise UnsupportedOptionError(
                f"merged tokens weigh by their size, and the encoder's attention {attention!r} takes no bias: use "
                'attn_implementation="sdpa" or "eager" for the encoder, or give proportional=False.'
            )
        return cls(rule, amounts, tower.prefix)

    def bias(self, given: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """(items, 1, 1, tokens) logarithm of the sizes, for the attention of the next layer."""
        if self.size is None or not self.rule.weighs:
            return given
        return self.size.log()[:, None, None].to(dtype)

    def merge(self, index: int, hidden: Tensor, merged: Selection | None) -> Selection | None:
        """Merge the tokens (items, tokens, C) of one layer; they wait in `mid`. None if none merge here."""
        if index >= len(self.amounts) or not self.amounts[index] or self.keys is None:
            return None
        tokens = hidden.shape[1]
        slot, slots = self.rule.join(self.keys, self.amounts[index], self.prefix)
        size = hidden.new_ones(hidden.shape[:2], dtype=torch.float32) if self.size is None else self.size
        self.mid = kernels.merge_tokens(hidden, slot, slots, size)
        self.size = torch.zeros(len(size), slots, device=size.device).scatter_add_(1, slot, size)
        slot = slot[:, self.prefix :] - self.prefix  # the tokens before the patches stay where they are
        before = torch.arange(tokens - self.prefix, device=slot.device).expand_as(slot)
        into = slot if merged is None or merged.merge_into is None else slot.gather(1, merged.merge_into)
        names = before if merged is None else merged.keep
        # each slot is named by the first of its patches
        keep = torch.full((len(slot), slots - self.prefix), into.shape[1], device=slot.device)
        keep = keep.scatter_reduce(1, slot, names, "amin")
        return Selection(keep, torch.ones_like(keep, dtype=torch.bool), into)


@dataclass
class HalfHooks:
    """Hooks of the halves of one encoder layer."""

    local: Local
    index: int

    def install(self, block: nn.Module, halves: tuple[str, str]) -> list[Any]:
        """Register them; returns the handles."""
        norm, mlp = (getattr(block, name) for name in halves)
        return [
            norm.register_forward_pre_hook(self.before_norm),
            mlp.register_forward_hook(self.after_mlp),
            block.register_forward_hook(self.after_block, prepend=True),
        ]

    @eager
    def before_norm(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Merge between the halves."""
        run = self.local.encoder
        if run is None or run.inside is None:
            return None
        merged = run.inside.merge(self.index, args[0], run.merged)
        run.inside.keys = None
        if merged is None:
            return None
        run.merged = merged
        return (run.inside.mid,)

    @eager
    def after_mlp(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Keep the sum of the second half; the layer adds a zero to tokens that are there no more."""
        run = self.local.encoder
        if run is None or run.inside is None or run.inside.mid is None:
            return None
        run.inside.out, run.inside.mid = run.inside.mid + output, None
        return output.new_zeros(1, 1, 1)

    @eager
    def after_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hand on the merged tokens."""
        run = self.local.encoder
        if run is None or run.inside is None or run.inside.out is None:
            return None
        made, run.inside.out = run.inside.out, None
        return (made, *output[1:]) if isinstance(output, tuple) else made
