"""Which slots of a cache layer stay, and the cut that the earlier layers get at the end of the prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.indices import PAD, has_padding, on, pack, take

if TYPE_CHECKING:
    from mustdrop.kv import Slots

AT_ONCE = 1 << 28  # bytes of cache that are cut at once


@dataclass(frozen=True)
class Cut:
    """A gather of cache slots, and the bookkeeping after it. Layers with the same slots share one."""

    index: Tensor
    positions: Tensor
    vision: Tensor
    padded: bool
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, positions: Tensor, vision: Tensor, keep: Tensor) -> Cut | None:
        """The cut that keeps the slots where `keep` (B, slots) is True; None if no row loses anything."""
        real = positions != PAD
        if bool((keep | ~real).all()):
            return None
        index = pack(keep & real)
        padded = has_padding(index)
        positions, vision = (take(x, index, 1, padded) for x in (positions, vision))
        if padded:
            gone = index == PAD
            positions, vision = positions.masked_fill(gone, PAD), vision & ~gone
        return cls(index, positions, vision, padded)


def evict_dropped(layers: list[Slots], start: int, here: Tensor) -> None:
    """Cut from every layer the vision entries of the chunk at `start` that are not `here` at its end.

    Layers that hold the same tokens share one index and, afterwards, the same bookkeeping tensors.

    Args:
        layers: the cache layers to cut.
        start: logical position of the chunk's first token.
        here: (B, length) bool, tokens of the chunk that the last decoder layer still processed.
    """
    shared: dict[int, Cut | None] = {}
    alike: dict[tuple[int, int, torch.device], list[Slots]] = {}
    for layer in layers:
        key = id(layer.layout)
        if key not in shared:
            positions, vision = layer.slot_positions(), layer.slot_vision()
            if positions is None or vision is None:
                continue
            inside = (positions >= start) & (positions < start + here.shape[1])
            stays = take(here.to(positions.device), (positions - start).clamp(0, here.shape[1] - 1), 1)
            shared[key] = Cut.of(positions, vision, ~vision | ~inside | stays)
        cut = shared[key]
        if cut is not None:
            alike.setdefault((key, id(layer.index(cut)), layer.keys.device), []).append(layer)
    for (key, _, _), some in alike.items():
        cut = shared[key]
        assert cut is not None  # only layers that lose something are collected
        _cut(some, cut)
    _share(layers)


def cut_alike(layers: list[Slots], cut: Cut) -> None:
    """Cut layers that hold the same tokens."""
    alike: dict[tuple[int, torch.device], list[Slots]] = {}
    for layer in layers:
        if layer.slots:
            alike.setdefault((id(layer.index(cut)), layer.keys.device), []).append(layer)
    for some in alike.values():
        _cut(some, cut)


def _cut(layers: list[Slots], cut: Cut) -> None:
    """Cut layers of one device and one index, as many at once as may exist twice for a moment."""
    left = list(layers)
    while left:
        part = [left.pop() for _ in range(min(len(left), max(1, AT_ONCE // left[-1].storage_bytes())))]
        index = on(part[0].index(cut), part[0].keys.device)
        stored = kernels.compact([t for layer in part for t in layer.entries()], index)
        for layer, keys, values in zip(part, stored[::2], stored[1::2], strict=True):
            layer.store(cut, keys, values)
        part[0].count(part)


def _share(layers: list[Slots]) -> None:
    """Let layers that hold the same entries now, by whatever way they lost the others, share what describes them."""
    known: list[Slots] = []
    for layer in layers:
        positions = layer.positions
        if positions is None or any(positions is one.positions for one in known):
            continue
        same = next((one for one in known if one.same_entries(layer)), None)
        if same is None:
            known.append(layer)
            continue
        for other in layers:
            if other.positions is positions:
                other.share(same)
