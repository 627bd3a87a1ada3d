"""A cache layer of fixed size that is smaller than the sequence is long, and can be compiled.

Everything about the layout is decided in the prefill, outside of any compiled code: how many entries there is room for,
and which logical position each of them has, those of tokens yet to come included. A decode step writes one entry, reads
`fixed` and moves one counter, so it is the same program every time.

The counter lies on the device, and a compiled or captured step moves it without any of this code being run. So the host
keeps a number of its own beside it (`filled`) only from the moment at which a pass of the prompt has read or set the
counter to the end of that pass: there each update comes through the hook of its layer (`_receive`) or is a cut
(`store`). Before and after, who asks reads the counter and waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from mustdrop.compat import eager, fixed_address
from mustdrop.indices import HOST, PAD, on
from mustdrop.kv.cut import Cut
from mustdrop.kv.entries import Arrival, Held, Stored
from mustdrop.kv.on_device import OnDevice
from mustdrop.kv.slots import Slots


class PrunedStaticLayer(Slots, StaticLayer):
    """A static cache layer with a logical length and fewer physical slots.

    `max_cache_len` stays what it was, the most logical tokens. There is room for `max_cache_len - dropped` entries, and
    `cumulative_length` counts logical tokens, as transformers reads it: those of the slots that are filled, and those
    without one. `positions` are those of the last prompt, as in a growing layer.

    Attributes:
        dropped: logical tokens that have no slot.
        ready: whether a pass over this cache has ended, so that a compiled decode step may follow.
        filled: slots that are filled, as far as the host can know (see above); None: ask the device.
        fixed: (B, room) long on the device of the entries, for decode steps: `positions`, and those of the tokens that
            will fill the other slots; made when a pass has ended. A tensor of its own: to a compiler, layers that share
            one are another program than layers that do not.
        sliced: whether the next compiled steps belong to a `generate` whose mask hides nothing. Then no slot is hidden
            but those not filled yet, and a mask over logical positions without its first `dropped` columns says that.
            `fixed` is not made before somebody else needs it.
    """

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.dropped, self.ready = 0, False
        self.forget()

    def forget(self) -> None:
        """Start the bookkeeping anew."""
        super().forget()
        self.filled: int | None = None
        self.fixed: Tensor | None = None
        self.sliced = False

    @classmethod
    def adopt(cls, layer: StaticLayer) -> PrunedStaticLayer:
        """Take over a layer of transformers, with what it holds."""
        new = cls(layer.max_cache_len)
        vars(new).update(vars(layer))  # the same tensors, under whatever names this release has for them
        return new

    # -- what transformers asks ---------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate room for as many entries as can come."""
        logical = self.max_cache_len
        self.max_cache_len = max(0, logical - self.dropped)
        try:
            super().lazy_initialization(key_states, value_states)
        finally:
            self.max_cache_len = logical

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write entries; the arrival set by the layer hook says which logical positions they have.

        Returns:
            (B, G, room, D) keys and values; in the prefill of a layer that lost tokens, only the filled part of them.
        """
        arrival = self.expect_hook()
        if self.lends and self.is_initialized:  # an interrupt ended the pass that should have cut it
            self.own()
        if arrival is not None:
            return self._receive(arrival, key_states, value_states)
        if self.filled is not None:
            self.filled = None
        return self._follow(key_states, value_states) if self.dropped else super().update(key_states, value_states)

    def _follow(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write entries after those that are filled, as the counter on the device says."""
        many, device = key_states.shape[2], self.cumulative_length.device
        place = torch.arange(-self.dropped, many - self.dropped, dtype=torch.long, device=device)
        place = place + self.cumulative_length
        self.cumulative_length.add_(many)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values

    def get_seq_length(self, *args: Any) -> Any:
        """Logical length, dropped tokens included: a tensor, as compiled code needs it, or 0."""
        if not self.is_initialized:
            return 0
        return self.logical if self.lends else self.cumulative_length  # what is held only is not counted there yet

    def reset(self) -> None:
        """Forget everything; a layer that had lost tokens will be allocated anew, in full size."""
        super().reset()
        if self.dropped:
            self.keys = self.values = None
            self.is_initialized = False
        self.dropped, self.ready = 0, False
        self.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.reorder_rows(beam_idx)

    # -- what the runtime asks ----------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        """Physical entries stored (waits for the device where `filled` is not known)."""
        if not self.is_initialized:
            return 0
        return int(self.cumulative_length) - self.dropped if self.filled is None else self.filled

    @property
    def logical(self) -> int:
        """Logical length (waits like `slots`)."""
        return self.slots + self.dropped

    @property
    def described(self) -> bool:
        """Whether slots may hold other tokens than those of their own number.

        A compiler is shown nothing but `fixed`: which layers share `positions` would make another program of each.
        """
        return self.fixed is not None or self.sliced if torch.compiler.is_compiling() else super().described

    @property
    def plain(self) -> bool:
        """Whether the layer is one of transformers in all but name: it needs no hook, and forgets nothing."""
        return self.whole and self._positions is None

    def slice(self, mask: Tensor) -> Tensor:
        """The mask over slots, of one over logical positions that hides none but those to come.

        The last slots hold tokens that follow one another, and those before hold tokens that are always seen: so it is
        what comes after as many columns as there are tokens without a slot. `mask` is (B or 1, 1, queries, keys).
        """
        return mask[..., self.dropped : self.dropped + self.keys.shape[2]]

    def slot_positions(self, extra: int = 0) -> Tensor | None:
        """(B, slots + extra) logical position per slot, PAD on padding; `extra` counts tokens about to arrive."""
        slots = self.slots
        if not slots:
            return None
        known = self.positions
        first = 0 if known is None else known.shape[1]
        if known is not None and first >= slots + extra:
            return cast(Tensor, known[:, : slots + extra])
        dropped = 0 if known is None else self.dropped  # tokens after those that are known follow one another
        tail = torch.arange(first + dropped, slots + extra + dropped, dtype=torch.long, device=HOST)
        tail = tail.expand(self.keys.shape[0], -1)
        return tail if known is None else torch.cat([known, tail], 1)

    def stored(self, slots: int | Tensor, before: Stored | None = None) -> Stored:
        """What the layer stores now; `slots` is a copy of its counter."""
        if not self.is_initialized:
            return Stored(None, 0, 0, 0)
        return Stored(self._positions, slots, self.dropped, self.keys.shape[0], self.pictures)

    def storage_bytes(self) -> int:
        """Bytes of the tensors that hold keys and values, room for tokens to come included."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def bytes_held(self) -> tuple[int, int]:
        """Bytes of keys and values, and those that the layer would take with room for every token."""
        held, room = self.storage_bytes(), self.keys.shape[2] if self.is_initialized else 0
        return held, held // room * self.max_cache_len if room else 0

    def room(self, left: int) -> int:
        """Entries that there must be room for where a cut leaves so many: these, and the tokens to come."""
        return max(left, self.max_cache_len - self.dropped - self.slots + left)

    def index(self, cut: Cut) -> Tensor:
        """(B, room) long: what a cut leaves, then the room for later tokens, which nothing sees before it is filled."""
        free = self.room(cut.index.shape[1]) - cut.index.shape[1]
        if ("room", free) not in cut.memo:
            cut.memo["room", free] = torch.nn.functional.pad(cut.index, (0, free), value=PAD)
        return cut.memo["room", free]  # type: ignore[no-any-return]

    def store(self, cut: Cut, keys: Tensor, values: Tensor) -> None:
        """Hold what a cut left of `entries`, in smaller tensors that have the room."""
        self.carry(cut)
        self.dropped += self.slots - cut.index.shape[1]
        self.keys, self.values = fixed_address(keys), fixed_address(values)
        self.filled = cut.index.shape[1]
        self._place(cut.positions)
        self.vision, self.padded, self.whole, self.lends = cut.vision, cut.padded, False, False

    def hold(self, held: Held, totals: Tensor, advance: int) -> None:
        """Make room for the entries of an inner cache's layer, with what is known of them; `write` brings them."""
        own = held.layer
        self.dropped = advance - own.keys.shape[2]
        if not self.is_initialized or self.dropped:
            self.lazy_initialization(own.keys, own.values)
        self._place(held.positions)
        self.vision, self.totals, self.padded, self.whole = held.vision, totals, held.padded, held.whole
        self.attended = self.queries = None
        self.filled = own.keys.shape[2]

    @staticmethod
    def write(pairs: Sequence[tuple[PrunedStaticLayer, Any]]) -> None:
        """Copy the entries that were announced to `hold`, of all layers at once, and count them."""
        room = [x for layer, own in pairs for x in _first(layer, own.keys.shape[2])]
        torch._foreach_copy_(room, [x for _, own in pairs for x in (own.keys, own.values)])
        by_number: dict[int, list[Tensor]] = {}
        for layer, _ in pairs:
            by_number.setdefault(layer.logical, []).append(layer.cumulative_length)
        for number, counters in by_number.items():
            torch._foreach_zero_(counters)
            torch._foreach_add_(counters, number)

    def share(self, other: Slots) -> None:
        """Describe the same entries by the tensors of another layer."""
        super().share(other)
        self.fixed, self.sliced = None, False

    def select_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply `select` to the batch rows of the bookkeeping."""
        super().select_rows(select)
        self.fixed = None if self.fixed is None else select(self.fixed)

    def count(self, layers: Sequence[Slots]) -> None:
        """After a cut of several layers with as many entries as this one: their counters on the device, all at once."""
        counters = [layer.cumulative_length for layer in layers if isinstance(layer, PrunedStaticLayer)]
        torch._foreach_zero_(counters)
        torch._foreach_add_(counters, self.logical)  # it is the same in all layers

    @staticmethod
    def settle(layers: Sequence[PrunedStaticLayer], slices: bool = False) -> None:
        """A pass has ended: what is known of the slots goes to the device, and the host stops counting.

        Layers of one device that hold the same entries get their own parts of one tensor.

        Args:
            layers: of one cache.
            slices: whether the passes that follow come with masks that hide nothing, see `sliced`.
        """
        alike: dict[Any, list[PrunedStaticLayer]] = {}
        for layer in layers:
            layer.filled = None
            known = layer._positions
            layer.sliced = slices and known is not None and not layer.padded
            if known is not None and layer.fixed is None and not layer.sliced:
                key = (known.shape, isinstance(known, OnDevice), layer.dropped, layer.max_cache_len, layer.keys.device)
                alike.setdefault(key, []).append(layer)
        for some in alike.values():
            each = _stacked([layer._positions for layer in some], some[0].keys.device)
            first, room = each.shape[2] + some[0].dropped, some[0].max_cache_len
            if first < room:  # the tokens that will fill the other slots
                future = torch.arange(first, room, dtype=torch.long, device=each.device)
                each = torch.cat([each, future.expand(*each.shape[:2], -1)], 2)
            if len(each) < len(some):
                each = each.expand(len(some), -1, -1).clone()
            for layer, own in zip(some, each.unbind(0), strict=True):
                layer.fixed = fixed_address(own)

    @eager
    def _receive(self, arrival: Arrival, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk in which tokens may have been dropped before this layer."""
        known, marks, slots = self.slot_positions(), self.slot_vision(), self.slots
        self.learn(arrival, slots + self.dropped)
        self.whole &= arrival.whole
        lost = arrival.advance - key_states.shape[2]
        self.dropped += lost
        if lost and self.is_initialized:
            self._store(self.keys[:, :, :slots], self.values[:, :, :slots])
        if self.lends and key_states.shape[2] <= self.max_cache_len - self.dropped:
            self._hold(key_states, value_states)
            self.filled = key_states.shape[2]
        else:
            self.lends = False
            self._write(key_states, value_states, slots)
        keys, values = self.keys, self.values
        key = ("arrived", id(self.layout), slots)
        if key not in arrival.memo:
            new = arrival.positions if known is None else torch.cat([known, arrival.positions], 1)
            arrival.memo[key] = (self.layout, new)  # holding the old layout keeps its id from being used again
        self._place(arrival.memo[key][1])
        self.vision = arrival.vision if marks is None else torch.cat([marks, arrival.vision], 1)
        self.totals = arrival.totals if self.totals is None else self.totals + arrival.totals
        self.attended = self.queries = None
        if self.whole:
            return keys, values
        # no query may see the room for later tokens: leaving it out is cheaper than masking it
        end = slots + key_states.shape[2]
        return keys[:, :, :end], values[:, :, :end]

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        """Keep the first entries as they are: `store` or `own` gives them the room for later tokens."""
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.batch_size, self.num_heads = keys.shape[:2]
        self.k_head_dim, self.v_head_dim = keys.shape[-1], values.shape[-1]
        self.cumulative_length = fixed_address(torch.zeros((), dtype=torch.long, device=keys.device))
        self.keys, self.values = keys, values

    def own(self) -> None:
        """Copy what was held without a copy and has not been cut to where there is room for more."""
        if self.lends and self.is_initialized:
            self._store(self.keys, self.values)
        self.lends = False

    def _store(self, keys: Tensor, values: Tensor) -> None:
        """Allocate anew and write these entries, (B, G, n, D), as the first ones."""
        self.lazy_initialization(keys, values)
        self._write(keys, values, 0)

    def _write(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Write these entries, (B, G, n, D), from slot `first` on, and count them."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        end = first + keys.shape[2]
        if end > self.keys.shape[2]:
            super().update(keys, values)  # the error is transformers' own
        self.keys[:, :, first:end], self.values[:, :, first:end] = keys, values
        self.cumulative_length.fill_(end + self.dropped)
        self.filled = end

    def _place(self, positions: Tensor) -> None:
        """Note the positions (B, n) of the filled slots; when the pass has ended, those of tokens to come follow."""
        self.positions, self.fixed, self.sliced, self.ready = positions, None, False, False


def _first(layer: PrunedStaticLayer, n: int) -> tuple[Tensor, Tensor]:
    return layer.keys[:, :, :n], layer.values[:, :, :n]


def _stacked(values: list[Any], device: torch.device) -> Tensor:
    """(L or 1, B, n) of (B, n) per layer on `device`, in one copy; 1 where all layers share them."""
    own = [value.there if isinstance(value, OnDevice) else value for value in values]
    if all(value is own[0] for value in own):
        return on(own[0], device)[None]
    return on(torch.stack(own), device)
