"""Merging inside an encoder layer, between its attention and its MLP.

A layer computes x = h + attention(norm(h)) and then x + mlp(norm(x)). Its second norm is given the merged x, the MLP's
output is kept and replaced by a zero, and when the layer is done its output is replaced by merged x + MLP output. So no
layer's code is repeated here, and only the sum of the second half is made twice.
"""

from __future__ import annotations

import functools
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
from mustdrop.runtime.attention_capture import implementation_of
from mustdrop.runtime.state import Local
from mustdrop.selection import Selection


class FollowedSelection(Selection):
    """What merging in the layers has come to after one of them; computed when somebody asks, since most do not."""

    def __init__(self, inside: BlockMerging) -> None:
        moves, names, base = list(inside.moves), inside.names, inside.base
        lengths, prefix = list(inside.lengths), inside.prefix
        assert names is not None  # something has merged
        object.__setattr__(self, "_find", lambda: _followed(moves, names, lengths, prefix, base))

    @functools.cached_property
    def _found(self) -> Selection:
        return self._find()  # type: ignore[attr-defined,no-any-return]

    @property
    def keep(self) -> Tensor:
        """See `Selection`."""
        return self._found.keep

    @property
    def valid(self) -> Tensor:
        """See `Selection`."""
        return self._found.valid

    @property
    def merge_into(self) -> Tensor | None:
        """See `Selection`."""
        return self._found.merge_into


def _followed(moves: list[Tensor], names: Tensor, lengths: list[int], prefix: int, base: Selection | None) -> Selection:
    """The patches through all layers; `names` (items, slots) are the first of each slot, counted with the prefix."""
    into = kernels.followed(moves)[:, prefix:] - prefix  # the tokens before the patches stay where they are
    if base is not None and base.merge_into is not None:
        into = into.gather(1, base.merge_into.to(into.device))
    keep, slots = names[:, prefix:] - prefix, names.shape[1] - prefix
    if min(lengths) == max(lengths):
        return Selection(keep, torch.ones(keep.shape, dtype=torch.bool, device=keep.device), into)
    counts = torch.tensor(lengths, dtype=torch.long, device=keep.device) - prefix
    valid = torch.arange(slots, dtype=torch.long, device=keep.device) < counts[:, None]
    return Selection(keep.masked_fill(~valid, 0), valid, into)


@dataclass
class BlockMerging:
    """State of merging in one pass through an encoder.

    Each item has amounts of its own, so that an image becomes the same tokens in every batch. Items with fewer tokens
    than others are padded at the end; nobody sees the padding. All numbers are known before the first layer runs.

    Attributes:
        rule: what merges.
        amounts: per item, tokens that merge in each layer. Items that become no feature may be missing.
        prefix: tokens before the patches.
        keys: (items, tokens, D) of the layer that is running, or (items, heads, tokens, D).
        mid: its tokens between the halves.
        out: its output.
        size: (items, tokens) float, patches that each token stands for; None before anything has merged.
        logs: (items, tokens) logarithms of the sizes.
        names: (items, tokens) long, first patch of each token, counted with those before the patches.
        lengths: tokens that each item has, those before the patches included; empty before anything has merged.
        moves: (items, tokens) long of each layer that merged, slot of each token.
        base: what windows had merged before.
    """

    rule: InnerRule
    amounts: Sequence[Sequence[int]]
    prefix: int
    keys: Tensor | None = None
    mid: Tensor | None = None
    out: Tensor | None = None
    size: Tensor | None = None
    logs: Tensor | None = None
    names: Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    moves: list[Tensor] = field(default_factory=list)
    base: Selection | None = None
    memo: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, rule: InnerRule, amounts: Sequence[Sequence[int]], tower: Tower) -> BlockMerging:
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

    @property
    def uneven(self) -> bool:
        """Whether items have different numbers of tokens now."""
        return bool(self.lengths) and min(self.lengths) < max(self.lengths)

    def read(self, k: Tensor) -> None:
        """Keep the keys (items, heads, tokens, D) of the layer that is running."""
        self.keys = k if self.rule.per_head else k.float().mean(1)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """(items, 1, 1, tokens) logarithm of the sizes, for the attention of the next layer; padding is hidden.

        None where merged tokens weigh like others.
        """
        if self.logs is None or not self.rule.weighs:
            return None
        return self.logs.to(dtype)[:, None, None]

    def nothing(self, like: Tensor) -> Tensor:
        """(1, 1, 1) zero, made once."""
        key = (like.dtype, like.device)
        if key not in self.memo:
            self.memo[key] = like.new_zeros(1, 1, 1)
        return self.memo[key]

    def merge(self, index: int, hidden: Tensor, merged: Selection | None) -> Selection | None:
        """Merge the tokens (items, tokens, C) of one layer; they wait in `mid`. None if none merge here."""
        items, tokens = hidden.shape[:2]
        numbers = [own[index] if index < len(own) else 0 for own in self._of_items(items)]
        if self.keys is None or not any(numbers):
            return None
        if not self.moves:
            self.base, self.lengths = merged, [tokens] * items
            self.names = None if merged is None else _names(merged, self.prefix, hidden.device)
        slot = self._slots(index, numbers)
        self.moves.append(slot)
        slots = max(self.lengths)
        self.mid, self.size, self.logs, self.names = kernels.merge_sized(hidden, slot, slots, self.size, self.names)
        return FollowedSelection(self)

    def _of_items(self, items: int) -> list[tuple[int, ...]]:
        """Amounts of so many items; those that nobody asked for merge like the items with the fewest tokens left."""
        amounts = [tuple(own) for own in self.amounts] or [()]
        return amounts + [max(amounts, key=sum)] * (items - len(amounts))

    def _slots(self, index: int, numbers: list[int]) -> Tensor:
        """(items, tokens) long, where each token of a layer goes; `lengths` become what is left."""
        assert self.keys is not None
        kinds = list(zip(numbers, self.lengths, strict=True))
        if len(set(kinds)) == 1:
            slot, left = answers.slots(self.rule, self.keys, numbers[0], self.prefix)
            self.lengths = [left] * len(kinds)
            return slot
        lengths = [self._left(*kind) for kind in kinds]
        numbers_there, lengths_there = self._on_device(index, kinds)
        found = answers.uneven_slots(self.rule, self.keys, numbers_there, lengths_there, lengths, self.prefix)
        if found is not None:
            self.lengths = lengths
            return found
        return self._in_groups(kinds)

    def _on_device(self, index: int, kinds: list[tuple[int, int]]) -> Tensor:
        """(2, items) long, what goes and what there is in one layer; those of all layers are sent at once."""
        assert self.keys is not None
        now = [own for _, own in kinds]
        key = (index, tuple(now))
        if key not in self.memo:
            amounts, plan = self._of_items(len(kinds)), {}
            for layer in range(index, max(map(len, amounts))):
                go = [own[layer] if layer < len(own) else 0 for own in amounts]
                plan[layer, tuple(now)] = [go, now]
                now = [self._left(*kind) for kind in zip(go, now, strict=True)]
            sent = torch.tensor(list(plan.values()), dtype=torch.long, device=self.keys.device)
            self.memo |= dict(zip(plan, sent, strict=True))
        return self.memo[key]

    def _left(self, number: int, tokens: int) -> int:
        """Tokens that are left of so many if `number` go, or as many as can."""
        return tokens - max(0, min(number, (tokens - self.prefix) // 2))

    def _in_groups(self, kinds: list[tuple[int, int]]) -> Tensor:
        """`_slots` where the rule takes only items that are alike."""
        assert self.keys is not None
        keys, lengths = self.keys, list(self.lengths)
        slot = torch.full((len(kinds), keys.shape[-2]), -1, dtype=torch.long, device=keys.device)
        for number, own in dict.fromkeys(kinds):
            items = [item for item, kind in enumerate(kinds) if kind == (number, own)]
            key = ("items", *items)
            if key not in self.memo:
                self.memo[key] = torch.tensor(items, dtype=torch.long, device=keys.device)
            mine = self.memo[key]
            slot[mine, :own], left = answers.slots(self.rule, keys[mine][..., :own, :], number, self.prefix)
            for item in items:
                lengths[item] = left
        self.lengths = lengths
        return slot


def _names(merged: Selection, prefix: int, device: torch.device) -> Tensor:
    """(items, tokens) long, first patch of each token after windows have merged, counted with the prefix."""
    assert merged.merge_into is not None
    names = merged.keep.masked_fill(~merged.valid, merged.merge_into.shape[1]) + prefix
    front = torch.arange(prefix, dtype=torch.long, device=names.device).expand(len(names), -1)
    return torch.cat([front, names], 1).to(device)


@dataclass
class BlockMergingHooks:
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
        inside: BlockMerging = run.inside
        return inside.nothing(output)

    @eager
    def after_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hand on the merged tokens."""
        run = self.local.encoder
        if run is None or run.inside is None or run.inside.out is None:
            return None
        made, run.inside.out = run.inside.out, None
        return (made, *output[1:]) if isinstance(output, tuple) else made
