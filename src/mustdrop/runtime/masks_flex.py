"""Masks of flex attention: a function of indices instead of rows and columns.

Transformers' function speaks of logical queries and keys. Instead of being cut, it is asked about the logical positions
of the rows and slots that exist. The block tables are made without a compiler: the functions are new for every prompt
and every step, and their shapes change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from mustdrop.indices import PAD

if TYPE_CHECKING:
    from mustdrop.runtime.masks import RowMap

FLEX = "flex_attention"

#: What an attention function may get as its mask.
Mask: TypeAlias = Tensor | BlockMask | None

__all__ = ["FLEX", "BlockMask", "Mask", "causal", "cut", "cut_items", "dense", "hides", "of_keys", "seen_by", "whole"]


def cut(mask: BlockMask, layout: RowMap) -> BlockMask:
    """The mask over the rows and slots of a layer. As in `RowMap.causal`, a padded query sees itself."""
    n, k = layout.queries.shape[1], layout.slots.shape[1]
    columns = layout.columns(layout.first(mask))
    rows, there, slots = layout.rows.clamp(min=0), columns != PAD, columns.clamp(min=0)
    # one function for rows with and without padding: the kernel is compiled once per function
    itself = torch.arange(k - n, k, dtype=torch.long, device=rows.device).where(layout.queries == PAD, PAD)
    asks = mask.mask_mod

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        known = asks(b, h, rows[b, q], slots[b, kv]) & there[b, kv]
        return (itself[b, q] == PAD) & known | (itself[b, q] == kv)

    return create_block_mask(sees, len(rows), None, n, k, device=rows.device)


def causal(layout: RowMap) -> BlockMask:
    """The mask of rows whose causality follows another order than the logical one, which is `layout.causal()`."""
    visible = layout.causal()

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return visible[b, q, kv]

    rows, n, k = visible.shape
    return create_block_mask(sees, rows, None, n, k, device=visible.device)


def of_keys(visible: Tensor) -> BlockMask:
    """The mask of items whose tokens, (items, N) bool, see all visible ones."""

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return visible[b, kv]

    return create_block_mask(sees, len(visible), None, visible.shape[1], visible.shape[1], device=visible.device)


def cut_items(mask: BlockMask, slots: Tensor, visible: Tensor) -> BlockMask:
    """A mask over patches as one over the tokens that merging left; arguments as for `cut_encoder_mask`."""
    asks = mask.mask_mod

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return asks(b, h, slots[b, q], slots[b, kv]) & visible[b, kv]

    return create_block_mask(sees, len(slots), None, slots.shape[1], slots.shape[1], device=slots.device)


def seen_by(mask: BlockMask, rows: Tensor, keys: int) -> Tensor:
    """(B, R, keys) bool, what query rows (B, R) see; rows of PAD mean nothing."""
    if not rows.numel():
        return torch.zeros(*rows.shape, keys, dtype=torch.bool, device=rows.device)
    place, asks = rows.clamp(min=0), mask.mask_mod

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return asks(b, h, place[b, q], kv)

    return create_mask(sees, len(rows), None, rows.shape[1], keys, device=rows.device)[:, 0]


def whole(mask: BlockMask) -> Tensor:
    """(items, 1, queries, keys) bool, what each query sees."""
    items, _, queries, keys = mask.shape
    return create_mask(mask.mask_mod, items, None, queries, keys, device=mask.kv_num_blocks.device)


def dense(mask: Mask) -> Tensor | None:
    """A mask of flex attention with rows and columns, any other as it is."""
    return whole(mask) if isinstance(mask, BlockMask) else mask


def hides(mask: Mask) -> bool:
    """Whether a mask may hide anything. Flex attention gets one where others get none."""
    return not bool(whole(mask).all()) if isinstance(mask, BlockMask) else mask is not None
