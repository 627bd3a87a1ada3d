"""A growing cache layer that stores fewer entries than the sequence is long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from mustdrop.compat import crop_length, records_past
from mustdrop.errors import CacheStateError
from mustdrop.indices import HOST
from mustdrop.kv.cut import Cut
from mustdrop.kv.entries import Arrival, Held, Stored
from mustdrop.kv.slots import Slots, reordering

_SLIDE = 64  # tokens after which a sliding layer with gaps looks for entries that have left its window
_KNOWN = ("positions", "vision", "attended", "queries")  # one entry per slot that is described


class PrunedLayer(Slots, DynamicLayer):
    """A growing cache layer with a logical length and fewer physical slots.

    `positions`, `vision`, `attended` and `queries` describe the first slots, those of the last prefill; slots after
    them are decoded tokens whose positions follow one another, so that a decode step adds no bookkeeping tensor.

    Without `positions` the slots are the newest tokens in their order, and the layer is what transformers takes it for:
    it tells the sizes that a layer of transformers would, hands out the same entries, and needs no hook.

    Attributes:
        window: tokens that a query sees, itself included, in a layer with a sliding window or chunks; None in others.
        logical: tokens that the layer stands for.
        steps: decode steps since the last prefill.
        record_past: whether entries that have left the window stay until the next `crop`, so that it can go back.
        forgotten: logical position before which entries have been given up, because they had left the window.
        incoming: whether what comes is noted once the pass has ended: see `mustdrop.kv.inner`.
    """

    incoming = False
    is_sliding = False
    window: int | None = None
    record_past = False
    logical: int = 0
    steps: int = 0
    forgotten: int = 0

    def __init__(self, window: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if window is not None:
            self.is_sliding, self.window = True, window

    @classmethod
    def adopt(cls, layer: Any) -> PrunedLayer:
        """Take over a layer of transformers, with what it holds (of a sliding window, the newest entries)."""
        if type(layer) is DynamicLayer and not layer.is_initialized:
            return cls()
        new = cls(int(layer.sliding_window) if layer.is_sliding else None)
        new.record_past = records_past(layer)
        if layer.is_initialized and layer.keys is not None and layer.keys.numel():
            new.logical = layer.get_seq_length()
            new.keys, new.values = layer.keys, layer.values
            new.dtype, new.device, new.is_initialized = layer.keys.dtype, layer.keys.device, True
            new.forgotten = new.logical - new.slots
        return new

    # -- what transformers asks ---------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append entries; the arrival set by the layer hook says which logical positions they have."""
        if self.incoming:
            return super().update(key_states, value_states)
        reordering.index = None  # the next one will be another
        if self.arrival is None and self._positions is None and self.window is None:
            self.prepared = False
            self.logical += key_states.shape[-2]
            self.steps += 1
            return self._append(key_states, value_states)
        arrival = self.arrival if self.prepared else self.expect_hook()
        self.arrival, self.prepared = None, False
        shown = 0 if self.window is None else self.shown(key_states.shape[-2])
        if arrival is None:
            self.logical += key_states.shape[-2]
            self.steps += 1
        else:
            self._note(arrival)
        keys, values = self._append(key_states, value_states)
        if arrival is not None or self.described or self.window is None:
            return keys, values  # what a sliding layer may forget is decided at the end of the pass
        self.slide()
        return keys[:, :, -shown:], values[:, :, -shown:]

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store entries after the others; the first ones are copied, and not appended to an empty tensor."""
        if self.is_initialized:
            return super().update(keys, values)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        lends = self.lends
        self.keys = keys if lends and _compact(keys) else _copy(keys)
        self.values = values if lends and _compact(values) else _copy(values)
        return self.keys, self.values

    def _note(self, arrival: Arrival) -> None:
        """What arrives, after what is known of the slots."""
        if not self.slots:
            (self._positions, self._vision), self.totals = arrival.noted, arrival.totals
        else:
            known, marks = self.slot_positions(), self.slot_vision()
            assert known is not None  # there are slots
            assert marks is not None
            self.positions = torch.cat([known, arrival.positions], 1)
            self.vision = torch.cat([marks, arrival.vision], 1)
            self.totals = arrival.totals if self.totals is None else self.totals + arrival.totals
        self.attended = self.queries = None
        if arrival.pictures is not None:
            self.learn(arrival, self.logical)
        self.steps = 0
        self.logical += arrival.advance
        self.whole &= arrival.whole

    def hold(self, held: Held, totals: Tensor, advance: int) -> None:
        """Take the entries of an inner cache's layer, with what is known of them; the layer is empty."""
        self.keys, self.values = held.layer.keys, held.layer.values
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        self.positions, self.vision, self.totals = held.positions, held.vision, totals
        self.attended = self.queries = None
        self.steps, self.logical, self.padded, self.whole = 0, advance, held.padded, held.whole

    def activate_past_recording(self) -> None:
        """From now on nothing is forgotten before the next `crop`; layers without a window never forget."""
        self.record_past = self.window is not None

    def get_seq_length(self, *args: Any) -> int:
        """Logical length: how many tokens the sequence has, dropped ones included."""
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the columns of a mask.

        What `update` hands out, while it hands out the newest tokens. Else logical ones: the layer hooks map them to
        slots.
        """
        total = self.logical + query_length
        if self.window is None or self.described:
            return total, 0
        length = min(self.logical, self.window - 1) + query_length
        return length, total - length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.logical = self.steps = self.forgotten = 0
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
        """Remove the newest tokens; then forget what has left the window, where that was put off.

        Raises:
            CacheStateError: the range reaches back to where vision tokens were dropped, or the tokens before it would
                see entries that a sliding layer has forgotten or, in transformers, would have forgotten.
        """
        remove = crop_length(tokens_to_remove, self.logical)
        if remove and self.slots:
            self._check_crop(remove)
            kept = self.slots - remove
            if self._positions is not None and kept < self._positions.shape[1]:
                for name in _KNOWN:
                    value = getattr(self, name)
                    setattr(self, name, None if value is None else value[:, :kept])
            self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
            self.logical -= remove
            self.pictures = None if self.pictures is None else self.pictures[:, : self.logical]
            if not self.logical:  # an empty layer describes no entries
                self.forget()
        self._slide()

    def _check_crop(self, remove: int) -> None:
        if self.window is not None and self.logical >= self.window and not self.record_past:
            raise CacheStateError(
                f"cannot crop {remove} tokens from a layer with a sliding window of {self.window} tokens that has seen "
                f"{self.logical}: it forgets what has left its window. Call cache.activate_past_recording() (newer "
                "versions of transformers have it) before the tokens that may be taken back, or start with a new cache."
            )
        if self.window is not None and self.forgotten > max(0, self.logical - remove - self.window + 1):
            raise CacheStateError(
                f"cannot crop {remove} tokens: a layer with a sliding window of {self.window} tokens has forgotten "
                f"what token {self.logical - remove} would see. Crop what has come since activate_past_recording() or "
                "the last crop, or start with a new cache."
            )
        known = self.slot_positions()
        newest = torch.arange(self.logical - remove, self.logical, dtype=torch.long, device=HOST)
        if known is not None and (known.shape[1] < remove or not bool((known[:, -remove:] == newest).all())):
            raise CacheStateError(
                f"cannot crop {remove} tokens from a pruned cache: vision tokens were dropped in that range."
            )

    # -- what the runtime asks ----------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Physical entries stored."""
        keys = self.keys
        return 0 if keys is None or not self.is_initialized or keys.ndim < 4 else keys.shape[-2]

    def slot_positions(self, extra: int = 0) -> Tensor | None:
        """(B, slots + extra) logical position per slot, PAD on padding; `extra` counts tokens about to arrive."""
        if not self.slots:
            return None
        known = 0 if self.positions is None else self.positions.shape[1]
        if known == self.slots and not extra:
            return self.positions  # type: ignore[no-any-return]
        tail = torch.arange(self.logical - (self.slots - known), self.logical + extra, dtype=torch.long, device=HOST)
        tail = tail.expand(self.keys.shape[0], -1)
        return tail if self.positions is None else torch.cat([self.positions, tail], 1)

    def stored(self, slots: int | Tensor, before: Stored | None = None) -> Stored:
        """What the layer stores now, `slots` entries; `before`, of another layer, where that says the same."""
        n = self.slots
        batch = self.keys.shape[0] if n else 0
        found = (self._positions if n else None, n, self.logical - n, batch, self.pictures)
        return before if before is not None and before.says(*found) else Stored(*found)

    @property
    def plain(self) -> bool:
        """Whether the layer is one of transformers in all but name: it needs no hook, and forgets nothing."""
        return self._positions is None and self.window is None

    def storage_bytes(self) -> int:
        """Bytes of the tensors that hold keys and values."""
        return 0 if not self.slots else self.keys.nbytes + self.values.nbytes

    def bytes_held(self) -> tuple[int, int]:
        """Bytes of keys and values, and those that a layer of transformers would take."""
        slots = self.slots
        if not slots:
            return 0, 0
        held = self.keys.nbytes + self.values.nbytes
        unpruned = self.unpruned_slots
        return held, held if unpruned == slots else held // slots * unpruned

    @property
    def unpruned_slots(self) -> int:
        """Entries that a layer of transformers would hold: all, or the newest of a sliding window."""
        return self.logical if self.window is None else min(self.logical, self.window - 1)

    def shown(self, extra: int) -> int:
        """How many entries `update` will hand out if `extra` tokens arrive that follow one another."""
        if self.window is None or self.described or self.arrival is not None:
            return self.slots + extra
        return min(self.slots, self.window - 1) + extra

    def takes(self, mask: Any, extra: int) -> bool:
        """Whether a mask of transformers is right for this layer as it is, for `extra` tokens about to arrive.

        Layers of one kind share a mask, and it has the columns of the first of them.
        """
        if self.described:
            return False
        return mask is None or self.window is None or bool(mask.shape[-1] == self.shown(extra))

    def slide(self) -> None:
        """Forget what no later token can see: entries that have left the sliding window.

        Where nothing was dropped, exactly the entries stay that transformers would hold. With gaps it looks from time
        to time how many may go.
        """
        if not self.record_past and (self.whole or not self.steps % _SLIDE):
            self._slide()

    def _slide(self) -> None:
        if self.window is None or not self.slots or self.slots < self.window:
            return
        surplus = self.slots - (self.window - 1)
        if not self.whole:
            positions = self.slot_positions()
            assert positions is not None  # there are slots
            surplus = int((positions <= self.logical - self.window).sum(1).min())
        self.forgotten = max(self.forgotten, self.logical - self.window + 1)
        for name in _KNOWN:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[:, min(surplus, value.shape[1]) :])
        self.keys, self.values = self.keys[:, :, surplus:].clone(), self.values[:, :, surplus:].clone()

    def store(self, cut: Cut, keys: Tensor, values: Tensor) -> None:
        """Hold what a cut left of `entries`."""
        self.carry(cut)
        self.keys, self.values = keys, values
        self.positions, self.vision, self.padded, self.whole = cut.positions, cut.vision, cut.padded, False
        self.lends = False

    def own(self) -> None:
        """Copy what was held without a copy and has not been cut; it may lie in another order than a copy does."""
        if self.lends and self.slots:
            self.keys, self.values = self.keys.contiguous(), self.values.contiguous()
        self.lends = False

    def _rows(self, select: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = select(self.keys), select(self.values)
        self.select_rows(select)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _compact(x: Tensor) -> bool:
    """Whether a tensor takes no more memory than its numbers need: it is no part of a larger one."""
    (a, b, c, d), (p, q, r, s) = x.shape, x.stride()
    return (a - 1) * p + (b - 1) * q + (c - 1) * r + (d - 1) * s < x.numel()
