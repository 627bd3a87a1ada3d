"""Attention masks: what transformers built for logical positions, mapped to the rows and slots that exist."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import count_up
from mustdrop.errors import UnsupportedOptionError
from mustdrop.indices import PAD, on, take
from mustdrop.runtime import masks_flex
from mustdrop.runtime.masks_flex import FLEX, BlockMask, Mask


@dataclass(frozen=True)
class RowMap:
    """Which rows ask and which slots answer in one layer.

    Attributes:
        rows: (B, n) long, index of each query row inside the current chunk, PAD on padding.
        queries: (B, n) long, logical position of each query row, PAD on padding.
        slots: (B, k) long, logical position of each key slot, PAD on padding. The last n slots are the query rows.
        padded: whether any of them is PAD.
        end: logical tokens of the sequence, those of the chunk included.
        reordered: causality follows the physical order instead of the logical positions.
    """

    rows: Tensor
    queries: Tensor
    slots: Tensor
    padded: bool
    end: int
    reordered: bool = False
    memo: dict[torch.device, RowMap] = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> RowMap:
        """The same on another device; sent there once."""
        if self.rows.device == device:
            return self
        if device not in self.memo:
            rows, queries, slots = (on(x, device) for x in (self.rows, self.queries, self.slots))
            self.memo[device] = RowMap(rows, queries, slots, self.padded, self.end, self.reordered)
        return self.memo[device]

    def first(self, mask: Tensor | BlockMask) -> int:
        """Logical position of the first column of a mask: it may leave out what has left a sliding window.

        The last column of such a mask is the newest token. A longer one, with room for later tokens, begins with the
        first token.
        """
        return max(0, self.end - int(mask.shape[-1]))

    def columns(self, first: int) -> Tensor:
        """(B, k) long, column of each slot in a mask that begins at position `first`; PAD where it has none."""
        return (self.slots - first).clamp(min=PAD) if first else self.slots

    def causal(self) -> Tensor:
        """(B, n, k) bool: slot exists and does not come after the query.

        A padded query sees itself, so no row is empty.
        """
        n, k = self.queries.shape[1], self.slots.shape[1]
        here = torch.arange(k - n, k, dtype=torch.long, device=self.slots.device)
        there = torch.arange(k, dtype=torch.long, device=self.slots.device)
        before = there <= here[:, None] if self.reordered else self.slots[:, None] <= self.queries[..., None]
        return ((self.slots != PAD)[:, None] & before) | (there == here[:, None]) & (self.queries == PAD)[..., None]


def physical_mask(mask: object, layout: RowMap, implementation: str, hidden: Tensor) -> Mask:
    """The mask one layer needs.

    Args:
        mask: what transformers passed: None, (B, keys) for flash attention, a block mask for flex attention, or
            (B or 1, 1, queries, keys), bool or additive.
        layout: rows and slots of this layer.
        implementation: attention implementation of the text model.
        hidden: (B, n, C) input of the layer: device of a new mask and, for eager attention, type of an additive one.

    Returns:
        None where a plain causal pattern is right, else a mask of the same kind over (n, k).

    Raises:
        UnsupportedOptionError: any other mask, or one that its attention implementation does not come with.
    """
    if isinstance(mask, BlockMask):
        layout = layout.on(mask.kv_num_blocks.device)
        return masks_flex.causal(layout) if layout.reordered else masks_flex.cut(mask, layout)
    foreign = implementation == FLEX and getattr(mask, "ndim", 0) != 2
    if foreign or (mask is not None and not isinstance(mask, Tensor)):
        raise UnsupportedOptionError(
            f"attention masks of type {type(mask).__name__} cannot be pruned with attn_implementation="
            f"{implementation!r}: use attn_implementation='sdpa'."
        )
    flash = "flash" in implementation
    fresh = layout.slots.shape[1] == layout.queries.shape[1]
    if mask is not None and mask.ndim == 2:
        columns = layout.on(mask.device).columns(layout.first(mask))
        visible = take(mask, columns, 1).bool() & (columns != PAD)
        return None if bool(visible.all()) else visible
    if flash:
        return (layout.on(hidden.device).slots != PAD) if layout.padded else None
    if layout.reordered or mask is None:
        single = layout.queries.shape[1] == 1
        if not layout.padded and (single or (fresh and implementation == "sdpa")):
            return None
        return _cast(layout.on(hidden.device).causal()[:, None], None, implementation, hidden.dtype)
    first = layout.first(mask)
    whole = not layout.padded and (not first or bool((layout.slots >= first).all()))  # as the host knows
    layout = layout.on(mask.device)
    columns = layout.columns(first)
    known = mask if mask.shape[0] == layout.rows.shape[0] else mask.expand(layout.rows.shape[0], -1, -1, -1)
    known = kernels.cut_mask(known, layout.rows, columns)
    if whole:
        return known
    gone = (columns == PAD)[:, None, None]
    alone = (layout.queries == PAD)[:, None, :, None]
    n, k = layout.queries.shape[1], layout.slots.shape[1]
    itself = (
        torch.eye(n, k, dtype=torch.bool, device=known.device).roll(k - n, 1)
        if k > n
        else torch.eye(n, dtype=torch.bool, device=known.device)
    )
    if known.dtype == torch.bool:
        return torch.where(alone, itself, known & ~gone)
    lowest = torch.finfo(known.dtype).min
    closed = torch.zeros_like(itself, dtype=known.dtype).masked_fill(~itself, lowest)
    return torch.where(alone, closed, known.masked_fill(gone, lowest))


def fixed_mask(mask: object, positions: Tensor, padded: bool) -> Tensor:
    """The mask of a static cache layer.

    Args:
        mask: what transformers passed, (B or 1, 1, queries, logical keys), bool or additive.
        positions: (B, slots) long, logical position per slot, those not filled yet included, PAD on padding.
        padded: whether `positions` holds PAD.

    Returns:
        The mask over slots, (B, 1, queries, slots). It needs no causal part of its own: transformers hides the
        positions that are not filled yet.

    Raises:
        UnsupportedOptionError: any other kind of mask.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise UnsupportedOptionError(
            "a pruned static cache needs a mask with queries and keys, and the attention implementation came with "
            f"{type(mask).__name__}: use model.set_attn_implementation('sdpa')."
        )
    known = take(mask, positions, 3, padded)
    if not padded:
        return known
    hidden = (positions == PAD)[:, None, None]
    return known & ~hidden if known.dtype == torch.bool else known.masked_fill(hidden, torch.finfo(known.dtype).min)


def encoder_mask(visible: Tensor, implementation: str, hidden: Tensor) -> Mask:
    """The mask for encoder layers over ragged tokens: `visible` (B, N) bool; None if all are.

    Device and, for eager attention, type are those of `hidden`, the input of the layer.
    """
    if bool(visible.all()):
        return None
    visible = on(visible, hidden.device)
    if implementation == FLEX:
        return masks_flex.of_keys(visible)
    return (
        visible
        if "flash" in implementation
        else _cast(visible[:, None, None], visible.shape[1], implementation, hidden.dtype)
    )


def cut_encoder_mask(mask: Tensor | BlockMask, slots: Tensor, visible: Tensor) -> Tensor | BlockMask:
    """A mask of transformers over patches, cut to the tokens that merging left.

    Args:
        mask: (items, N), or (items or 1, 1, N, N), bool or additive, or a block mask.
        slots: (items, M) long, the patch that names each remaining token.
        visible: (items, M) bool, tokens that are not padding.
    """
    if isinstance(mask, BlockMask):
        return masks_flex.cut_items(mask, slots, visible)
    if mask.ndim == 2:
        return take(mask, slots, 1) & visible.to(mask.dtype)
    known = mask.expand(slots.shape[0], -1, -1, -1)
    known = kernels.cut_mask(known, slots.to(known.device), slots.to(known.device))
    if known.dtype == torch.bool:
        return known & visible[:, None, None]
    return known.masked_fill(~visible[:, None, None], torch.finfo(known.dtype).min)


def attended_keys(mask: Tensor | BlockMask) -> Tensor:
    """(items or 1, keys) bool, the keys that any query sees by a mask of transformers (2-D, 4-D or of blocks)."""
    if isinstance(mask, BlockMask):
        return masks_flex.whole(mask)[:, 0].any(1)
    if mask.ndim == 2:
        return mask.bool()
    return shows(mask).flatten(1, 2).any(1)


def shows(mask: Tensor) -> Tensor:
    """Where a mask shows a key to a query, of the same shape: a bool one says it, an additive one is not its lowest."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _cast(visible: Tensor, rows: int | None, implementation: str, dtype: torch.dtype) -> Tensor:
    if rows is not None:
        visible = visible.expand(-1, -1, rows, -1)
    if implementation != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def visible_keys(rows: Tensor, mask: Mask, queries: int, keys: int) -> tuple[Tensor, Tensor | None]:
    """Which keys a few query rows see.

    Args:
        rows: (B, R) long, query rows.
        mask: what the attention call got: None (causal), (B, keys), (B or 1, 1, queries, keys), bool or additive, or
            a block mask.
        queries: query rows of the call.
        keys: key slots of the call.

    Returns:
        (B, R, keys) bool, and the additive mask of these rows, (B, 1, R, keys), if there is one.
    """
    if isinstance(mask, BlockMask):
        return masks_flex.seen_by(mask, rows, keys), None
    if mask is None or mask.ndim == 2:
        place = rows if keys == queries else rows + (keys - queries)
        causal = count_up(1, keys, rows.device) <= place[..., None]
        return (causal if mask is None else causal & mask[:, None, :keys].bool()), None
    picked = take(mask.expand(rows.shape[0], -1, -1, -1), rows, 2)[..., :keys]
    return shows(picked[:, 0]), None if picked.dtype == torch.bool else picked
