"""Merging inside an encoder layer, between its attention and its MLP.

A layer computes x = h + attention(norm(h)) and then x + mlp(norm(x)). Its second norm is given the merged x, the MLP's
output is kept and replaced by a zero, and when the layer is done its output is replaced by merged x + MLP output. So no
layer's code is repeated here, and only the sum of the second half is made twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mustdrop import kernels
from mustdrop.adapters.base import Tower
from mustdrop.compat import eager
from mustdrop.errors import UnsupportedOptionError
from mustdrop.pruners import InnerRule, answers
from mustdrop.runtime.state import Local
from mustdrop.runtime.tap import implementation_of
from mustdrop.selection import Selection


@dataclass
class Group:
    """Items that merge as many tokens as each other in every layer.

    Attributes:
        amounts: tokens that merge in each layer.
        items: their numbers in the encoder's batch; None: all.
        tokens: tokens that each still has; None before anything has merged.
    """

    amounts: Sequence[int]
    items: list[int] | None = None
    tokens: int | None = None

    def here(self, layer: int) -> int:
        """Tokens that merge in one layer."""
        return self.amounts[layer] if layer < len(self.amounts) else 0


@dataclass
class Inside:
    """State of merging in one pass through an encoder.

    Each item has amounts of its own, so that an image becomes the same tokens in every batch. Items with fewer tokens
    than others are padded at the end; nobody sees the padding.

    Attributes:
        rule: what merges.
        amounts: per item, tokens that merge in each layer. Items that become no feature may be missing.
        prefix: tokens before the patches.
        groups: of items with the same amounts.
        size: (items, tokens) float, patches that each token stands for; None before anything has merged.
        keys: (items, tokens, D) of the layer that is running.
        mid: its tokens between the halves.
        out: its output.
        lengths: tokens that each item has, those before the patches included; empty before anything has merged.
    """

    rule: InnerRule
    amounts: Sequence[Sequence[int]]
    prefix: int
    groups: list[Group] = field(default_factory=list)
    size: Tensor | None = None
    keys: Tensor | None = None
    mid: Tensor | None = None
    out: Tensor | None = None
    lengths: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, rule: InnerRule, amounts: Sequence[Sequence[int]], tower: Tower) -> Inside:
        """Merging of `amounts` tokens in the layers of a tower.

        Raises:
            UnsupportedOptionError: the rule weighs merged tokens, and the tower's attention takes no bias.
        """
        attention = implementation_of(tower.blocks[0])
        if rule.weighs and any(map(any, amounts)) and ("flash" in attention or "flex" in attention):
            raise UnsupportedOptionError(
                f"merged tokens weigh by their size, and the encoder's attention {attention!r} takes no bias: use "
                'attn_implementation="sdpa" or "eager" for the encoder, or give proportional=False.'
            )
        return cls(rule, amounts, tower.prefix)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(items, 1, 1, tokens) logarithm of the sizes, for the attention of the next layer; padding is hidden.

        None where merged tokens weigh like others.
        """
        if self.size is None or not self.rule.weighs:
            return None
        return self.size.log().to(dtype).clamp(min=torch.finfo(dtype).min)[:, None, None]

    def merge(self, index: int, hidden: Tensor, merged: Selection | None) -> Selection | None:
        """Merge the tokens (items, tokens, C) of one layer; they wait in `mid`. None if none merge here."""
        groups = self._grouped(len(hidden))
        if self.keys is None or not any(group.here(index) for group in groups):
            return None
        device, (items, tokens, _) = hidden.device, hidden.shape
        slot = torch.full((items, tokens), -1, dtype=torch.long, device=device)
        for group in groups:
            mine = slice(None) if group.items is None else torch.tensor(group.items, dtype=torch.long, device=device)
            own = tokens if group.tokens is None else group.tokens
            joined = answers.slots(self.rule, self.keys[mine, :own], group.here(index), self.prefix)
            slot[mine, :own], group.tokens = joined
        self.lengths = self._lengths(items)
        slots = max(self.lengths)
        size = hidden.new_ones(items, tokens, dtype=torch.float32) if self.size is None else self.size
        self.mid = kernels.merge_tokens(hidden, slot, slots, size)
        # padding has no slot: its size, which is 0, goes anywhere
        self.size = size.new_zeros(items, slots).scatter_add_(1, slot.clamp(min=0), size)
        patches = slot[:, self.prefix :] - self.prefix  # the tokens before the patches stay where they are
        before = torch.arange(tokens - self.prefix, dtype=torch.long, device=device).expand_as(patches)
        into = patches if merged is None or merged.merge_into is None else patches.gather(1, merged.merge_into)
        names = before if merged is None else merged.keep.masked_fill(~merged.valid, into.shape[1])
        # each slot is named by the first of its patches
        keep = torch.full((items, slots - self.prefix), into.shape[1], dtype=torch.long, device=device)
        keep = keep.scatter_reduce(1, patches.clamp(min=0), names, "amin")
        valid = torch.ones(items, slots - self.prefix, dtype=torch.bool, device=device)
        if min(self.lengths) < slots:
            counts = torch.tensor(self.lengths, dtype=torch.long, device=device)
            valid = torch.arange(slots - self.prefix, dtype=torch.long, device=device) < (counts - self.prefix)[:, None]
            keep = keep.masked_fill(~valid, 0)
        return Selection(keep, valid, into)

    def _lengths(self, items: int) -> list[int]:
        """Tokens that each item has after a merge."""
        out = [0] * items
        for group in self.groups:
            for item in range(items) if group.items is None else group.items:
                out[item] = group.tokens or 0
        return out

    def _grouped(self, items: int) -> list[Group]:
        """The groups of so many items; those that nobody asked for merge like the items with the fewest tokens left."""
        if self.groups:
            return self.groups
        amounts = [tuple(own) for own in self.amounts] or [()]
        amounts += [max(amounts, key=sum)] * (items - len(amounts))
        found: dict[tuple[int, ...], list[int]] = {}
        for item, own in enumerate(amounts):
            found.setdefault(own, []).append(item)
        several = len(found) > 1
        self.groups = [Group(own, members if several else None) for own, members in found.items()]
        return self.groups


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
