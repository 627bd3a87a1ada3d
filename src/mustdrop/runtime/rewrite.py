"""A decoder layer's arguments, brought in line with the rows and cache slots that exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop import kernels, kv
from mustdrop.errors import UnsupportedOptionError
from mustdrop.runtime.entry import Media
from mustdrop.runtime.masks import Layout, fixed_mask, physical_mask
from mustdrop.runtime.rows import PAD
from mustdrop.runtime.state import Forward

if TYPE_CHECKING:
    from mustdrop.runtime.core import Runtime

#: `labels` come along in some families, and no layer reads them.
_HANDLED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "labels"}


class Rewriter:
    """Maps masks, rotary tables and positions from logical to physical; layers of one layout share the work."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def rewrite(
        self, layer: kv.Slots | None, forward: Forward, media: Media, hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """Positions, masks and whatever else has one entry per row, for the rows that are left."""
        layout = self._layout(layer, forward, media)
        self._map_mask(layout, forward, hidden, kwargs)
        for name, value in kwargs.items():
            if name.startswith("position_embeddings") and value is not None:
                kwargs[name] = self._rotary(layout, forward, hidden, value)
            elif name in self.runtime.adapter.row_arguments and value is not None:
                kwargs[name] = kernels.gather_rows([value], layout.rows.to(value.device))[0]
            elif name == "position_ids" and value is not None:
                # flash attention takes gaps between positions for the borders of packed samples
                kwargs[name] = None if self.runtime.flash else self._positions(layout, forward, value)
            elif name not in _HANDLED and isinstance(value, Tensor) and forward.length in value.shape:
                raise UnsupportedOptionError(
                    f"decoder layers of {type(self.runtime.text).__name__} take {name} with one entry per token, "
                    "which mustdrop does not know how to cut."
                )

    def _layout(self, layer: kv.Slots | None, forward: Forward, media: Media) -> Layout:
        key = ("layout", layer.layout_key if layer is not None else None)
        if key not in forward.memo:
            new = arrival(forward, media)
            before = layer.slot_positions() if layer is not None else None
            slots = new.positions if before is None else torch.cat([before.to(new.positions.device), new.positions], 1)
            padded = forward.padded if layer is None else layer.padded
            rows = forward.index(slots.device)
            forward.memo[key] = Layout(rows, new.positions, slots, padded, self.runtime.method.renumber)
        return forward.memo[key]  # type: ignore[no-any-return]

    def extend(self, layer: kv.Slots, forward: Forward, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """A decode step, or any chunk in which nothing is dropped, over a cache that has been pruned.

        Returns:
            Whether `kwargs` were changed.
        """
        mask, renumber = kwargs.get("attention_mask"), self.runtime.method.renumber
        if mask is None and not layer.padded and forward.length == 1 and not renumber and not self.runtime.flash:
            return False  # one query that sees every slot: nothing to map
        key = ("extend", layer.layout_key)
        if key not in forward.memo:
            slots = layer.slot_positions(extra=forward.length)
            assert slots is not None  # positions are known, so there are slots
            slots = slots.to((mask if isinstance(mask, Tensor) else hidden).device)  # the cache may lie elsewhere
            new = slots[:, -forward.length :]
            layout = Layout(forward.index(slots.device), new, slots, layer.padded, renumber)
            forward.memo[key] = (layer.layout, layout)
        layout = forward.memo[key][1]
        self._map_mask(layout, forward, hidden, kwargs)
        if self.runtime.flash:
            kwargs["position_ids"] = None
        if renumber:
            for name, value in kwargs.items():
                if name.startswith("position_embeddings") and value is not None:
                    kwargs[name] = self._rotary(layout, forward, hidden, value)
        return True

    def step(
        self, layer: kv.PrunedStaticLayer, hidden: Tensor, kwargs: dict[str, Any], memo: dict[Any, Any] | None = None
    ) -> bool:
        """Tokens that follow one another over a static cache that has been pruned; compiled code comes here too.

        Args:
            layer: cache layer.
            hidden: (B, q, C) input of the decoder layer.
            kwargs: its arguments.
            memo: shared by the layers of one pass; a compiler finds by itself what they have in common.

        Returns:
            Whether `kwargs` were changed.
        """
        if layer.whole:
            return False
        assert layer.positions is not None  # fixed when the first token was dropped
        mask = kwargs.get("attention_mask")
        if memo is None:
            kwargs["attention_mask"] = fixed_mask(mask, layer.positions, layer.padded)
        else:
            key = ("step", id(mask), id(layer.layout))
            if key not in memo:
                memo[key] = (mask, fixed_mask(mask, layer.positions, layer.padded))
            kwargs["attention_mask"] = memo[key][1]
        if self.runtime.method.renumber:
            stored = layer.cumulative_length - (layer.positions == PAD).sum(1, keepdim=True)
            place = stored + torch.arange(hidden.shape[1], device=hidden.device)
            for name, value in kwargs.items():
                if name.startswith("position_embeddings") and value is not None:
                    kwargs[name] = tuple(self.runtime.text.rotary_emb(hidden, place))
        return True

    def _map_mask(self, layout: Layout, forward: Forward, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        key = ("mask", id(mask), id(layout))
        if key not in forward.memo:
            made = physical_mask(mask, layout, self.runtime.implementation, hidden.dtype)
            forward.memo[key] = (mask, made)  # holding the mask keeps its id from being used again
        kwargs["attention_mask"] = forward.memo[key][1]

    def _positions(self, layout: Layout, forward: Forward, value: Tensor) -> Tensor:
        key = ("positions", id(value), id(layout))
        if key not in forward.memo:
            axes = [value] if value.ndim == 2 else list(value)  # (B, S), or (axes, B, S)
            cut = kernels.gather_rows(axes, layout.rows.to(value.device))
            forward.memo[key] = (value, cut[0] if value.ndim == 2 else torch.stack(cut))
        return forward.memo[key][1]  # type: ignore[no-any-return]

    def _rotary(
        self, layout: Layout, forward: Forward, hidden: Tensor, value: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        key = ("rotary", id(value), id(layout))
        if key not in forward.memo:
            if self.runtime.method.renumber:
                # position = how many stored tokens come before: what the released code's shorter sequence amounts to
                place = (layout.slots != PAD).cumsum(1)[:, -layout.queries.shape[1] :] - 1
                made = self.runtime.text.rotary_emb(hidden, place.clamp(min=0).to(hidden.device))
            elif isinstance(value, Tensor):  # one table of complex numbers
                (made,) = _cut_rows([value], layout.rows)
            else:
                made = tuple(_cut_rows(list(value), layout.rows))
            forward.memo[key] = (value, made)
        return forward.memo[key][1]  # type: ignore[no-any-return]


def arrival(forward: Forward, media: Media) -> kv.Arrival:
    """Logical positions of the current rows, for the cache layers."""
    if "arrival" not in forward.memo:
        index = forward.index(media.vision.device)
        positions = (index + forward.start).masked_fill(~forward.current(media.valid), PAD)
        vision, totals, whole = forward.current(media.vision), media.vision.sum(1), forward.rows is None
        made = kv.Arrival(positions, vision, totals, forward.length, whole)
        forward.memo["arrival"] = made
    return forward.memo["arrival"]  # type: ignore[no-any-return]


def _cut_rows(tables: list[Tensor], rows: Tensor) -> list[Tensor]:
    """Rows of rotary tables, each (B, S, D), or (axes, B, S, D) for multi-axis rotary embeddings."""
    flat = [axis for table in tables for axis in (table if table.ndim == 4 else [table])]
    cut = iter(kernels.gather_rows(flat, rows.to(tables[0].device)))
    return [torch.stack([next(cut) for _ in table]) if table.ndim == 4 else next(cut) for table in tables]
