"""A decoder layer's arguments, brought in line with the rows and cache slots that exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop import kernels, kv
from mustdrop.compat import CACHE_NAMES
from mustdrop.errors import UnsupportedOptionError
from mustdrop.indices import HOST, PAD, on
from mustdrop.runtime.language import recurrent
from mustdrop.runtime.language.vision_tokens import VisionTokens
from mustdrop.runtime.masks import RowMap, fixed_mask, physical_mask
from mustdrop.runtime.state import Forward

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime

#: `labels` come along in some families, and no layer reads them.
_HANDLED = {"attention_mask", "position_ids", "use_cache", "labels", *CACHE_NAMES}


class LayerArguments:
    """Maps masks, rotary tables and positions from logical to physical; layers of one layout share the work."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def rewrite(
        self,
        layer: kv.Slots | None,
        forward: Forward,
        media: VisionTokens,
        hidden: Tensor,
        kwargs: dict[str, Any],
        folds: bool = False,
    ) -> None:
        """Positions, masks and whatever else has one entry per row, for the rows that are left.

        Where the layer folds tokens into a state, its mask says which rows are padding, and nothing else.
        """
        if media.fixed is None:
            self._rewrite(layer, forward, media, hidden, kwargs, folds)
            return
        # layers hold the rows of this pass alone: who is given the same gets the same
        key = ("given", folds, *kwargs, *map(id, kwargs.values()))
        known = forward.memo.get(key)
        if known is not None:
            kwargs.update(known[1])
            return
        given = dict(kwargs)
        self._rewrite(layer, forward, media, hidden, kwargs, folds)
        changed = {name: kwargs[name] for name, value in given.items() if kwargs[name] is not value}
        forward.memo[key] = (given, changed)  # holding what came keeps its ids from being used again

    def _rewrite(
        self,
        layer: kv.Slots | None,
        forward: Forward,
        media: VisionTokens,
        hidden: Tensor,
        kwargs: dict[str, Any],
        folds: bool,
    ) -> None:
        layout = self._layout(layer, forward, media)
        if folds:
            kwargs["attention_mask"] = recurrent.mask(forward, hidden)
        else:
            self._map_mask(layout, forward, hidden, kwargs)
        cut: dict[str, int] = {}  # what has rows to cut, and its dimensions where there are several axes of positions
        for name, value in kwargs.items():
            axes = position_axes(self.runtime, name, value, forward.length)
            if axes is None:
                continue
            if name.startswith("position_embeddings") and self.runtime.method.renumber:
                kwargs[name] = self._renumbered(layout, forward, hidden)
            elif name == "position_ids" and forward.flash:  # it takes gaps between positions for borders of samples
                kwargs[name] = None
            else:
                cut[name] = axes
        self._cut(layout, forward, kwargs, cut)

    def _layout(self, layer: kv.Slots | None, forward: Forward, media: VisionTokens) -> RowMap:
        key = ("layout", layer.layout_key if layer is not None else None)
        if key not in forward.memo:
            new = arrival(forward, media)
            before = layer.slot_positions() if layer is not None else None
            slots = new.positions if before is None else torch.cat([before.to(HOST), new.positions], 1)
            padded = forward.padded if layer is None else layer.padded
            reordered = self.runtime.method.reorder
            forward.memo[key] = RowMap(forward.index, new.positions, slots, padded, forward.end, reordered)
        return forward.memo[key]  # type: ignore[no-any-return]

    def extend(self, layer: kv.Slots, forward: Forward, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """A decode step, or any chunk in which nothing is dropped, over a cache that has been pruned.

        Returns:
            Whether `kwargs` were changed.
        """
        mask, method = kwargs.get("attention_mask"), self.runtime.method
        renumber, reorder = method.renumber, method.reorder
        if mask is None and not layer.padded and forward.length == 1 and not renumber and not forward.flash:
            return False  # one query that sees every slot: nothing to map
        shown = layer.shown(forward.length)
        key = ("extend", layer.layout_key, shown)
        if key not in forward.memo:
            slots = layer.slot_positions(extra=forward.length)
            assert slots is not None  # an empty layer takes the mask as it is
            slots = slots[:, -shown:].to(HOST)
            layout = RowMap(forward.index, slots[:, -forward.length :], slots, layer.padded, forward.end, reorder)
            forward.memo[key] = (layer.layout, layout)
        layout = forward.memo[key][1]
        self._map_mask(layout, forward, hidden, kwargs)
        if forward.flash:
            kwargs["position_ids"] = None
        if renumber:
            for name, value in kwargs.items():
                if name.startswith("position_embeddings") and value is not None:
                    kwargs[name] = self._renumbered(layout, forward, hidden)
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
        mask = kwargs.get("attention_mask")
        slices = layer.sliced if memo is None else self.runtime.calls.shows_all and not layer.padded
        if slices and isinstance(mask, Tensor) and mask.ndim == 4:
            kwargs["attention_mask"] = layer.slice(mask)
            return True
        if layer.fixed is None:  # in a pass after one that has failed
            kv.PrunedStaticLayer.settle([layer])
        assert layer.fixed is not None  # the layer has lost something, so it knows positions
        if memo is None:
            kwargs["attention_mask"] = fixed_mask(mask, layer.fixed, layer.padded)
        else:
            key = ("step", id(mask), id(layer.layout))
            if key not in memo:
                memo[key] = (mask, fixed_mask(mask, layer.fixed, layer.padded))
            kwargs["attention_mask"] = memo[key][1]
        if self.runtime.method.renumber:
            stored = layer.cumulative_length - layer.dropped - (layer.fixed == PAD).sum(1, keepdim=True)
            place = stored + torch.arange(hidden.shape[1], dtype=torch.long, device=hidden.device)
            for name, value in kwargs.items():
                if name.startswith("position_embeddings") and value is not None:
                    kwargs[name] = tuple(self.runtime.text.rotary_emb(hidden, place))
        return True

    def _map_mask(self, layout: RowMap, forward: Forward, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        key = ("mask", id(mask), id(layout))
        if key not in forward.memo:
            made = physical_mask(mask, layout, self.runtime.implementation, hidden)
            forward.memo[key] = (mask, made)  # holding the mask keeps its id from being used again
        kwargs["attention_mask"] = forward.memo[key][1]

    def _cut(self, layout: RowMap, forward: Forward, kwargs: dict[str, Any], cut: dict[str, int]) -> None:
        """Only the layout's rows of what `cut` names, with one launch for all that this layer is the first to ask for.

        A value is a tensor, (B, S, ...), or several. With as many dimensions as `cut` says, it has axes of positions
        in front, as in multi-axis rotary embeddings.
        """
        keys = {name: ("cut", id(kwargs[name]), id(layout)) for name in cut}
        flat: dict[torch.device, list[Tensor]] = {}
        new = {name: kwargs[name] for name, key in keys.items() if key not in forward.memo}
        for name, value in new.items():
            for table in value if isinstance(value, tuple) else (value,):
                flat.setdefault(table.device, []).extend(table if table.ndim == cut[name] else [table])
        made = {place: iter(kernels.gather_rows(some, layout.on(place).rows)) for place, some in flat.items()}

        def back(table: Tensor, axes: int) -> Tensor:
            own = made[table.device]
            return torch.stack([next(own) for _ in table]) if table.ndim == axes else next(own)

        for name, value in new.items():
            several = isinstance(value, tuple)
            found = tuple(back(table, cut[name]) for table in value) if several else back(value, cut[name])
            forward.memo[keys[name]] = (value, found)  # holding the value keeps its id from being used again
        for name, key in keys.items():
            kwargs[name] = forward.memo[key][1]

    def _renumbered(self, layout: RowMap, forward: Forward, hidden: Tensor) -> Any:
        """Rotary tables of the places of tokens in what is stored, as in the released code's shorter sequence."""
        key = ("renumbered", id(layout))
        if key not in forward.memo:
            place = (layout.slots != PAD).cumsum(1)[:, -layout.queries.shape[1] :] - 1
            made = self.runtime.text.rotary_emb(hidden, on(place.clamp(min=0), hidden.device))
            forward.memo[key] = (layout, made)
        return forward.memo[key][1]


def position_axes(runtime: Runtime, name: str, value: Any, length: int) -> int | None:
    """Whether an argument of a decoder layer has an entry for each token, and how it lies.

    None if it has none; else the dimensions that it has where axes of positions come in front (0: they never do).

    Args:
        runtime: of the patched model.
        name: of the argument.
        value: of the argument.
        length: tokens of the pass.

    Raises:
        UnsupportedOptionError: it has, and nobody knows how to cut it.
    """
    if value is None:
        return None
    if name.startswith("position_embeddings"):
        return 4
    if name in runtime.adapter.row_arguments:
        return 0
    if name == "position_ids":
        return 3
    if name not in _HANDLED and isinstance(value, Tensor) and length in value.shape:
        raise UnsupportedOptionError(
            f"decoder layers of {type(runtime.text).__name__} take {name} with one entry per token, "
            "which mustdrop does not know how to cut."
        )
    return None


def arrival(forward: Forward, media: VisionTokens) -> kv.Arrival:
    """Logical positions of the current rows, for the cache layers."""
    if "arrival" not in forward.memo and media.fixed is not None:
        there, totals = media.fixed, torch.tensor(media.totals, dtype=torch.long, device=HOST)
        made = kv.Arrival(there.positions, there.vision, totals, forward.length, forward.rows is None)
        forward.memo["arrival"] = made
    elif "arrival" not in forward.memo:
        positions = (forward.index + forward.start).masked_fill(~forward.current(media.valid), PAD)
        vision, totals, whole = forward.current(media.vision), media.vision.sum(1), forward.rows is None
        made = kv.Arrival(positions, vision, totals, forward.length, whole, media.pictures)
        forward.memo["arrival"] = made
    return forward.memo["arrival"]  # type: ignore[no-any-return]
