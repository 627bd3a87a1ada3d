"""Fewer patches inside an encoder whose items lie side by side, padded to the longest (Gemma 4, SigLIP 2 of any shape).

As in a packed encoder, patches leave in cells and keep their positions; see `runtime/vision/packed.py`. What is left of
an item moves together, and the items are padded to the longest again: masks hide that padding. Padding that the
processor made belongs to no cell, and leaves with the first cells that do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mustdrop.indices import HOST, on
from mustdrop.runtime.masks import cut_encoder_mask, encoder_mask
from mustdrop.runtime.masks_flex import BlockMask
from mustdrop.runtime.vision.packed import Packed


@dataclass
class Padded(Packed):
    """The patches of one pass through such an encoder; rows of its items follow one another in all of `Packed`.

    Attributes:
        items: how many lie side by side.
        attention: the implementation that the layers' masks are made for.
    """

    items: int = 1
    attention: str = "eager"

    def enter(self, hidden: Tensor) -> None:
        """Note how many patches there are, (items, patches, C)."""
        self.items, self.total = len(hidden), hidden.shape[0] * hidden.shape[1]

    def arranged(self, stays: Tensor) -> Tensor:
        """(items * M,) long, what is left of each item at the start of its rows; -1 is padding."""
        known = torch.zeros_like(stays)
        known[self.cells[self.cells >= 0]] = True
        each = (stays & known).view(self.items, -1)
        counts = each.sum(1)
        if int(counts.max()) == each.shape[1]:  # no row becomes shorter: all stay where they are
            return torch.where(each.flatten(), torch.arange(self.total, dtype=torch.long, device=HOST), -1)
        order = each.int().argsort(dim=1, descending=True, stable=True)[:, : int(counts.max())]
        first = torch.arange(self.items, dtype=torch.long, device=HOST)[:, None] * each.shape[1]
        place = torch.arange(order.shape[1], dtype=torch.long, device=HOST)
        return torch.where(place < counts[:, None], order + first, -1).flatten()

    def shaped(self, flat: Tensor, like: Tensor) -> Tensor:
        """(items, M, C)."""
        return flat.view(self.items, -1, flat.shape[-1])

    def whole(self, found: Tensor) -> Tensor:
        """(N, ...) of what is known of the rows that are left, or were at some time; zeros where a patch was gone."""
        return found if len(found) == self.total else super().whole(found)

    def finish(self, named: dict[str, Any], hidden: Tensor) -> None:
        """Hide the padding, where no mask came, or one of blocks."""
        mask = named.get("attention_mask")
        if mask is None:
            named["attention_mask"] = encoder_mask(self._visible, self.attention, hidden)
        elif not isinstance(mask, Tensor):
            named["attention_mask"] = self._cut(mask, hidden.device)

    def made_of(self, name: str, value: Tensor) -> Tensor:
        """One argument of a layer with what belongs to the patches that are left; padding has that of a patch."""
        assert self.rows is not None
        if name == "attention_mask":
            made = self._cut(value, value.device)
            assert isinstance(made, Tensor)
            return made
        if value.shape[:2] == (self.items, self.total // self.items):
            return value.flatten(0, 1)[on(self.rows.view(self.items, -1).clamp(min=0), value.device)]
        return value

    def _cut(self, mask: Tensor | BlockMask, device: torch.device) -> Tensor | BlockMask:
        assert self.rows is not None
        first = torch.arange(self.items, dtype=torch.long, device=HOST)[:, None] * (self.total // self.items)
        slots = (self.rows.view(self.items, -1) - first).clamp(min=0)
        return cut_encoder_mask(mask, on(slots, device), on(self._visible, device))

    def after_last(self, output: Any) -> Any:
        """What the last layer gives, with all patches."""
        hidden = output[0] if isinstance(output, tuple) else output
        assert self.into is not None
        into, flat = on(self.into, hidden.device), hidden.flatten(0, 1)
        full = flat[into.clamp(min=0)].masked_fill((into < 0)[:, None], 0).view(self.items, -1, hidden.shape[-1])
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def after_tower(self, output: Any) -> Any:
        """What the encoder gives, with all patches in each hidden state that was asked for."""
        states = getattr(output, "hidden_states", None)
        if isinstance(states, tuple):
            full = (None if state is None else self.shaped(self.whole(state.flatten(0, 1)), state) for state in states)
            output["hidden_states"] = tuple(full)
        return output

    @property
    def _visible(self) -> Tensor:
        """(items, M) bool, rows that are no padding."""
        assert self.rows is not None
        return (self.rows >= 0).view(self.items, -1)
