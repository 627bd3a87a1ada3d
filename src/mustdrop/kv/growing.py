"""A growing cache layer that stores fewer entries than the sequence is long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from mustdrop.compat import crop_length
from mustdrop.errors import CacheStateError
from mustdrop.kv.slots import Slots, reordering
from mustdrop.runtime.eviction import Cut

_SLIDE = 64  # tokens after which a sliding layer with gaps looks for entries that have left its window
_KNOWN = ("positions", "vision", "attended", "queries")  # one entry per slot that is described


class PrunedLayer(Slots, DynamicLayer):
    """A growing cache layer with a logical length and fewer physical slots.

    `positions`, `vision`, `attended` and `queries` describe the first slots, those of the last prefill; slots after
    them are decoded tokens whose positions follow one another, so that a decode step adds no bookkeeping tensor.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys = self.values = None
        self.is_sliding, self.window = window is not None, window
        self.logical = 0
        self.steps = 0  # decode steps since the last prefill
        self.forget()

    @classmethod
    def adopt(cls, layer: Any) -> PrunedLayer:
        """Take over a layer of transformers, with what it holds (of a sliding window, the newest entries)."""
        new = cls(int(layer.sliding_window) if layer.is_sliding else None)
        if layer.is_initialized and layer.keys is not None and layer.keys.numel():
            new.logical = layer.get_seq_length()
            new.keys, new.values = layer.keys, layer.values
            new.dtype, new.device, new.is_initialized = layer.keys.dtype, layer.keys.device, True
            if new.slots != new.logical:  # a sliding layer that has forgotten its oldest entries
                newest = torch.arange(new.logical - new.slots, new.logical, dtype=torch.long, device="cpu")
                new.positions = newest.expand(new.keys.shape[0], -1)
                new.vision = torch.zeros_like(new.positions, dtype=torch.bool)
        return new

    # -- what transformers asks ---------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append entries; the arrival set by the layer hook says which logical positions they have."""
        arrival = self.expect_hook()
        reordering.index = None  # the next one will be another
        if arrival is None:
            self.logical += key_states.shape[-2]
            self.steps += 1
        else:
            arrival = arrival.on(self.home)
            known = self.slot_positions()
            marks = self.slot_vision()
            self.positions = arrival.positions if known is None else torch.cat([known, arrival.positions], 1)
            self.vision = arrival.vision if marks is None else torch.cat([marks, arrival.vision], 1)
            self.totals = arrival.totals if self.totals is None else self.totals + arrival.totals
            self.attended = self.queries = None
            self.steps = 0
            self.logical += arrival.advance
            self.whole &= arrival.whole
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, *args: Any) -> int:
        """Logical length: how many tokens the sequence has, dropped ones included."""
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical (length, offset): transformers builds logical masks, the layer hooks map them to slots."""
        return self.logical + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.logical = self.steps = 0
        self.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows for beam search."""
        if self.slots:
            place = beam_idx.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, place), self.values.index_select(0, place)
            self.reorder_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        if self.slots:
            self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices`."""
        if self.slots:
            self._rows(lambda t: t[indices.to(t.device), ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens.

        Raises:
            CacheStateError: the range reaches back to where vision tokens were dropped.
        """
        remove = crop_length(tokens_to_remove, self.logical)
        if not remove or not self.slots:
            return
        known = self.slot_positions()
        if known is not None:
            newest = torch.arange(self.logical - remove, self.logical, dtype=torch.long, device="cpu")
            if known.shape[1] < remove or not bool((known[:, -remove:] == newest).all()):
                raise CacheStateError(
                    f"cannot crop {remove} tokens from a pruned cache: vision tokens were dropped in that range."
                )
            kept = self.slots - remove
            if self.positions is not None and kept < self.positions.shape[1]:
                for name in _KNOWN:
                    value = getattr(self, name)
                    setattr(self, name, None if value is None else value[:, :kept])
        self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
        self.logical -= remove

    # -- what the runtime asks ----------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Physical entries stored."""
        return 0 if self.keys is None or not self.is_initialized or not self.keys.numel() else int(self.keys.shape[-2])

    def slot_positions(self, extra: int = 0) -> Tensor | None:
        """(B, slots + extra) logical position per slot, PAD on padding; `extra` counts tokens about to arrive."""
        if not self.slots:
            return None
        known = 0 if self.positions is None else self.positions.shape[1]
        tail = torch.arange(
            self.logical - (self.slots - known), self.logical + extra, dtype=torch.long, device="cpu"
        ).expand(self.keys.shape[0], -1)
        return tail if self.positions is None else torch.cat([self.positions, tail], 1)

    def storage_bytes(self) -> int:
        """Bytes of the tensors that hold keys and values."""
        return 0 if not self.slots else self.keys.nbytes + self.values.nbytes

    def unpruned_bytes(self) -> int:
        """Bytes that a layer of transformers would take."""
        return self.storage_bytes() // self.slots * self.unpruned_slots if self.slots else 0

    @property
    def unpruned_slots(self) -> int:
        """Entries that a layer of transformers would hold: all, or the newest of a sliding window."""
        return self.logical if self.window is None else min(self.logical, self.window - 1)

    def slide(self) -> None:
        """Forget what no later token can see: entries that have left the sliding window.

        Where nothing was dropped, exactly the entries stay that transformers would hold. With gaps it looks from time
        to time how many may go.
        """
        if self.window is None or self.slots < self.window or not self.slots:
            return
        surplus = self.slots - (self.window - 1)
        if not self.whole:
            positions = self.slot_positions()
            if positions is None or (self.steps and self.steps % _SLIDE):
                return
            surplus = int((positions <= self.logical - self.window).sum(1).min())
        known = 0 if self.positions is None else self.positions.shape[1]
        if self.positions is None:  # from here on the layer has to say which positions it holds
            self.positions = torch.zeros(self.keys.shape[0], 0, dtype=torch.long, device="cpu")
            self.vision = torch.zeros(self.keys.shape[0], 0, dtype=torch.bool, device="cpu")
        for name in _KNOWN:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[:, min(surplus, known) :])
        self.keys, self.values = self.keys[:, :, surplus:].clone(), self.values[:, :, surplus:].clone()

    def forget_if_whole(self) -> None:
        """Drop the bookkeeping of a layer that holds every token: it is a plain cache layer again."""
        if self.slots == self.logical:  # a sliding layer has to say which entries are left
            super().forget_if_whole()

    def store(self, cut: Cut, keys: Tensor, values: Tensor) -> None:
        """Hold what a cut left of `entries`."""
        self.carry(cut)
        self.keys, self.values = keys, values
        self.positions, self.vision, self.padded, self.whole = cut.positions, cut.vision, cut.padded, False

    def _rows(self, select: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = select(self.keys), select(self.values)
        self.select_rows(select)
