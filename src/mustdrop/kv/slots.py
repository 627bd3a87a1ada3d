"""What both kinds of cache layer share: which logical position each stored entry came from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.errors import CacheStateError
from mustdrop.indices import HOST, on, take
from mustdrop.kv.cut import Cut
from mustdrop.kv.entries import Arrival, Stored
from mustdrop.kv.on_device import Description, OnDevice


class _Reordering(threading.local):
    """The last reordering of this thread: the layers of one cache are asked one after the other, for the same one."""

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self.moved: dict[torch.device, Tensor] = {}
        self.done: dict[int, tuple[Tensor, Tensor]] = {}


reordering = _Reordering()


class Slots:
    """The bookkeeping of one cache layer, mixed into a layer class of transformers.

    `positions`, `vision` and `totals` are read on the host. What a prompt set on a device comes over when it is first
    read (`OnDevice`); `_positions` and `layout` are what was set.

    Attributes:
        keys: (B, G, slots or more, D), None before the first entry.
        values: (B, G, slots or more, D), None before the first entry.
        positions: (B, known or more) long, logical position of the first slots, PAD on padding; None while every slot
            holds the token of its own number.
        vision: (B, known) bool, which of the first slots hold vision tokens.
        attended: (B, known) float32, attention that the query rows read so far gave them, where that is read.
        queries: (B, known) float32, how many of these rows see each of them.
        totals: (B,) long, vision tokens that came, dropped ones included.
        pictures: (B, sequence) long, which picture of the chat the token at each position belongs to, -1 for text, as
            far as pictures have come; None where nobody asks for that.
        padded: whether `positions` holds PAD.
        whole: whether nothing was dropped or moved: slots are logical positions.
        arrival: what the next `update` brings, None for tokens that follow one another.
        prepared: whether the layer hook has run since the last `update`.
        lends: whether the first entries are held as they come, without a copy, since a cut at the end of the pass makes
            one.
    """

    keys: Any
    values: Any
    positions: Any = Description()
    vision: Any = Description()
    # a layer that nothing is known of holds none of this: a new cache has as many as the model has layers
    _positions: Tensor | OnDevice | None = None
    _vision: Tensor | OnDevice | None = None
    attended: Tensor | None = None
    queries: Tensor | None = None
    totals: Tensor | None = None
    pictures: Tensor | None = None
    arrival: Arrival | None = None
    padded: bool = False
    prepared: bool = False
    whole: bool = True
    lends: bool = False

    def forget(self) -> None:
        """Start the bookkeeping anew."""
        self._positions = self._vision = self.attended = self.queries = self.totals = self.pictures = None
        self.arrival, self.padded, self.prepared, self.whole, self.lends = None, False, False, True, False

    def learn(self, arrival: Arrival, start: int) -> None:
        """Note which pictures arrive after `start` logical tokens; the layers share what is known."""
        if arrival.pictures is None:
            return
        known = self.pictures
        key = ("pictures", id(known), start)
        if key not in arrival.memo:
            before = torch.full((len(arrival.pictures), start), -1, dtype=torch.long, device=HOST)
            if known is not None:
                before[:, : known.shape[1]] = known
            first = torch.nn.functional.pad(before, (1, 0), value=-1).amax(1, keepdim=True) + 1
            new = torch.where(arrival.pictures < 0, -1, arrival.pictures + first)
            arrival.memo[key] = (known, torch.cat([before, new], 1))  # holding what was known keeps its id its own
        self.pictures = arrival.memo[key][1]

    def apply(self, cut: Cut) -> None:
        """Store only the slots that a cut leaves."""
        keys, values = kernels.compact(self.entries(), on(self.index(cut), self.keys.device))
        self.store(cut, keys, values)
        self.count([self])

    def evict(self, keep: Tensor) -> None:
        """Keep only the slots where `keep` (B, slots) is True: storage shrinks, padding goes too.

        Args:
            keep: (B, slots) bool. Rows that keep fewer are padded on the left.
        """
        positions, vision = self.slot_positions(), self.slot_vision()
        if positions is None or vision is None:
            return
        cut = Cut.of(positions, vision, keep.to(positions.device))
        if cut is not None:
            self.apply(cut)

    def carry(self, cut: Cut) -> None:
        """Bring what was read of the slots in line with a cut of them."""
        for name in ("attended", "queries"):
            value = getattr(self, name)
            if value is not None:
                padded = torch.nn.functional.pad(value, (0, self.slots - value.shape[1]))
                setattr(self, name, take(padded, on(cut.index, value.device), 1))

    def storage_bytes(self) -> int:
        """Bytes of the tensors that hold keys and values."""
        raise NotImplementedError

    def entries(self) -> list[Tensor]:
        """Keys and values of the slots that are filled, each (B, G, slots, D)."""
        return [self.keys[:, :, : self.slots], self.values[:, :, : self.slots]]

    def index(self, cut: Cut) -> Tensor:
        """(B, n) long, entries that are gathered for a cut of this layer, PAD where nothing is. On the host."""
        return cut.index

    def room(self, left: int) -> int:
        """Entries that there must be room for where a cut leaves so many."""
        return left

    def store(self, cut: Cut, keys: Tensor, values: Tensor) -> None:
        """Hold what a cut left of `entries`, gathered by `index`."""
        raise NotImplementedError

    def count(self, layers: Sequence[Slots]) -> None:
        """After `store`: layers that count their entries on a device do; they hold as many as this one."""

    def own(self) -> None:
        """Copy what was held without a copy and has not been cut."""
        self.lends = False

    def share(self, other: Slots) -> None:
        """Describe the same entries by the tensors of another layer."""
        self._positions, self._vision, self.padded = other._positions, other._vision, other.padded

    @property
    def layout(self) -> object:
        """What layers with the same entries in the same slots share: its identity stands for the layout."""
        return self._positions

    @property
    def layout_key(self) -> tuple[int, int]:
        """Equal for layers that hold the same positions."""
        tail_only = self._positions is not None and not self._positions.shape[1]
        return (0 if tail_only else id(self.layout), self.slots)

    @property
    def slots(self) -> int:
        """Physical entries stored."""
        raise NotImplementedError

    def slot_positions(self, extra: int = 0) -> Tensor | None:
        """(B, slots + extra) logical position per slot, PAD on padding; `extra` counts tokens about to arrive."""
        raise NotImplementedError

    def slot_vision(self) -> Tensor | None:
        """(B, slots) bool, which slots hold vision tokens."""
        slots = self.slots
        if not slots:
            return None
        known = 0 if self.vision is None else self.vision.shape[1]
        if known == slots:
            return self.vision  # type: ignore[no-any-return]
        tail = torch.zeros(self.keys.shape[0], slots - known, dtype=torch.bool, device=HOST)
        return tail if self.vision is None else torch.cat([self.vision, tail], 1)

    def same_entries(self, other: Slots) -> bool:
        """Whether another layer holds the entries of the same tokens in the same slots."""
        a, b = (self.positions, self.vision), (other.positions, other.vision)
        return self.slots == other.slots and all(
            x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in zip(a, b, strict=True)
        )

    def stored(self, slots: int | Tensor, before: Stored | None = None) -> Stored:
        """What the layer stores now, `slots` entries; `before`, of another layer, where that says the same."""
        raise NotImplementedError

    @property
    def plain(self) -> bool:
        """Whether the layer is one of transformers in all but name: it needs no hook, and forgets nothing."""
        return False

    @property
    def described(self) -> bool:
        """Whether slots may hold other tokens than those of their own number, so that layers need their hooks."""
        return self._positions is not None

    def expect_hook(self) -> Arrival | None:
        """What arrives with this `update`.

        Raises:
            CacheStateError: the layer holds entries of a pruned prompt, and no layer hook has run.
        """
        if self.described and not self.prepared:
            raise CacheStateError(
                "this cache holds entries of a pruned prompt, and the model that uses it is not patched (any more). "
                "Patch it again with mustdrop.patch(model, ...), or start with a new cache."
            )
        arrival, self.arrival, self.prepared = self.arrival, None, False
        return arrival

    def shown(self, extra: int) -> int:
        """How many entries `update` will hand out if `extra` tokens arrive that follow one another."""
        return self.slots + extra

    def takes(self, mask: Any, extra: int) -> bool:
        """Whether a mask of transformers is right for this layer as it is, for `extra` tokens about to arrive."""
        return self._positions is None

    def slide(self) -> None:
        """Forget what has left a sliding window; most layers have none."""

    def reorder_rows(self, index: Tensor) -> None:
        """Select batch rows of the bookkeeping. Layers that shared a tensor share what becomes of it."""
        last = reordering
        if last.index is not index:
            last.index, last.moved, last.done = index, {}, {}

        def select(t: Tensor) -> Tensor:
            if id(t) not in last.done:
                if t.device not in last.moved:
                    last.moved[t.device] = index.to(t.device)
                last.done[id(t)] = t, t.index_select(0, last.moved[t.device])  # holding it keeps its id its own
            return last.done[id(t)][1]

        self.select_rows(select)

    def select_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply `select` to the batch rows of the bookkeeping."""
        for name in ("positions", "vision", "attended", "queries", "totals", "pictures"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, select(value))
