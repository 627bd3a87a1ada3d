"""Cache entries on their way: what arrives at a layer, what it stores, and what is handed on between passes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mustdrop.indices import HOST, PAD, take
from mustdrop.kv.on_device import OnDevice, at_home, wherever


@dataclass(frozen=True)
class Arrival:
    """What the next `update` of a layer brings.

    Attributes:
        positions: (B, n) long, logical position of each new entry, PAD on padding.
        vision: (B, n) bool, which of them are vision tokens.
        totals: (B,) long, vision tokens of the chunk, dropped ones included.
        advance: logical tokens that the chunk stands for (n plus what was dropped).
        whole: whether the new entries are all tokens of the chunk, in order.
        memo: what layers with the same entries derive from them.
        pictures: (B, advance) long, which picture of the chunk each token belongs to, -1 for text; None where nobody
            asks for that.
    """

    positions: Tensor
    vision: Tensor
    totals: Tensor
    advance: int
    whole: bool
    pictures: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def noted(self) -> tuple[Tensor | OnDevice | None, Tensor | OnDevice | None]:
        """`positions` and `vision` as a layer without entries notes them."""
        return wherever(self.positions), wherever(self.vision)


@dataclass(frozen=True, eq=False)
class Stored:
    """What a cache layer stores at one moment, without the keys and values: what comes later changes nothing in it.

    Attributes:
        positions: (B, known or more) long, logical position of the first slots, PAD on padding; None: each slot holds
            the token of its own number.
        slots: entries, or (1,) long: the logical length of a static cache, which only the device may know.
        dropped: logical tokens that have no slot.
        batch: B.
        pictures: see `Slots`.
    """

    positions: Tensor | OnDevice | None
    slots: int | Tensor
    dropped: int
    batch: int
    pictures: Tensor | None = None

    def says(
        self,
        positions: Tensor | OnDevice | None,
        slots: int | Tensor,
        dropped: int,
        batch: int,
        pictures: Tensor | None,
    ) -> bool:
        """Whether these are its attributes."""
        if self.positions is not positions or self.pictures is not pictures:
            return False
        alike = slots is self.slots if isinstance(slots, Tensor) else slots == self.slots
        return bool(alike) and (self.dropped, self.batch) == (dropped, batch)

    @functools.cached_property
    def number(self) -> int:
        """Entries per row, padding included."""
        return int(self.slots) - self.dropped if isinstance(self.slots, Tensor) else self.slots

    @property
    def logical(self) -> int:
        """Logical length."""
        return self.number + self.dropped

    @property
    def key(self) -> tuple[int, int]:
        """Equal for layers that store entries of the same positions. Both must be there while it is used."""
        tail_only = self.positions is None or not self.positions.shape[1]
        return (0 if tail_only else id(self.positions), self.number)

    @functools.cached_property
    def places(self) -> Tensor | None:
        """(B, slots) long, logical position per slot, PAD on padding; None without slots."""
        n, end = self.number, self.logical
        if not n:
            return None
        positions = at_home(self.positions)
        known = 0 if positions is None else min(n, positions.shape[1])
        tail = torch.arange(end - (n - known), end, dtype=torch.long, device=HOST).expand(self.batch, -1)
        return tail if positions is None else torch.cat([positions[:, :known], tail], 1)

    def lengths(self, start: int, valid: Tensor) -> Tensor:
        """(B,) long, stored entries per row without padding.

        `valid` (B, q) marks real tokens of the chunk at `start`.
        """
        positions = self.places
        if positions is None:
            return torch.zeros(valid.shape[0], dtype=torch.long, device=HOST)
        real = positions != PAD
        inside = (positions >= start) & (positions < start + valid.shape[1])
        if positions.shape[0] == valid.shape[0]:
            real &= ~inside | take(valid, (positions - start).clamp(0, valid.shape[1] - 1), 1)
        return real.sum(1)

    def held(self, start: int, marks: Tensor) -> Tensor:
        """(B,) long, stored entries per row that are marked; `marks` (B, q) covers the chunk at `start`."""
        positions = self.places
        if positions is None:
            return torch.zeros(marks.shape[0], dtype=torch.long, device=HOST)
        inside = (positions >= start) & (positions < start + marks.shape[1])
        marks = marks.repeat_interleave(positions.shape[0] // marks.shape[0], 0)
        return (inside & take(marks, (positions - start).clamp(0, marks.shape[1] - 1), 1)).sum(1)


@dataclass(frozen=True)
class Held:
    """What a pass of the prompt has left for one layer of the caller's cache.

    Attributes:
        layer: holds the entries.
        positions: (B, n) long, logical position of each, PAD on padding.
        vision: (B, n) bool, which of them are vision tokens.
        padded: whether `positions` holds PAD.
        whole: whether they are all tokens of the prompt, in order.
    """

    layer: Any
    positions: Tensor
    vision: Tensor
    padded: bool
    whole: bool
