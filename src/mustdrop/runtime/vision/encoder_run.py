"""What is known of one pass of media through an encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop.adapters.base import Tower
from mustdrop.pruners import Read
from mustdrop.runtime.masks_flex import Mask
from mustdrop.selection import Selection

if TYPE_CHECKING:
    from mustdrop.runtime.vision.block_merging import BlockMerging
    from mustdrop.runtime.vision.packed import Packed


@dataclass
class EncoderRun:
    """State of one pass of media through an encoder.

    Attributes:
        tower: the encoder.
        grid: (rows, columns) of the patches of one item where windows merge inside the encoder, else None.
        pool: patches per side of a feature.
        at_least: (items,) long, patches that merging must leave, or None.
        windows: per item, how many windows merge, where that is known beforehand; those after the last one merge none.
        even: whether windows have merged, as many in every item: none has padding.
        merged: what merging decided.
        names: (items, patches) long, the patch that names the window of each, and which of them name themselves; where
            `windows` are known.
        masks: attention masks of the layers after merging, by the mask that came and the tokens that are left.
        readings: what was read from the layers, a value or vector per patch, in the pieces in which they ran.
        item: patches of one item of a dense tower; 0 where all items lie in one sequence, or before it has run.
        leave: called with the encoder's output, all of whose patches are there again, before the model goes on with it.
        inside: merging between the halves of its layers, or None.
        seen: what a dense tower is shown in place of its pixels, or None.
        lengths: per encoder layer, the lengths of the sequences that attended to themselves.
        counted: the last of them after merging, and what merging had left then.
        rated: what attention was read of which layer, as a place in `lengths` -> whether that of every query was.
        borders: those of a packed sequence, by the id of the borders that they are of.
        packed: what is left of the patches of a packed tower where some may leave inside, or None.
        merges_packed: whether windows merge inside a packed tower.
        uncut: as `lengths`, had no patch left; kept for such a tower only.
    """

    tower: Tower
    grid: tuple[int, int] | None = None
    pool: int = 1
    at_least: Tensor | None = None
    windows: list[int] | None = None
    even: bool = False
    merged: Selection | None = None
    names: tuple[Tensor, Tensor] | None = None
    masks: dict[tuple[int, int], tuple[Selection, Mask]] = field(default_factory=dict)
    readings: dict[Read, list[Tensor]] = field(default_factory=dict)
    item: int = 0
    leave: Callable[[Any], Any] | None = None
    inside: BlockMerging | None = None
    seen: Callable[[Tensor], Tensor] | None = None
    lengths: list[Sequence[int] | Tensor] = field(default_factory=list)
    rated: dict[tuple[int, Read], bool] = field(default_factory=dict)
    counted: tuple[Selection, Sequence[int] | Tensor] | None = None
    borders: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    packed: Packed | None = None
    merges_packed: bool = False
    uncut: list[Sequence[int] | Tensor] = field(default_factory=list)

    def reading(self, read: Read) -> Tensor | None:
        """(patches,) or (patches, D), what was read of every patch of all items; None if the layer did not run."""
        pieces = self.readings.get(read)
        if not pieces:
            return None
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if not self.tower.packed:
            whole = whole.flatten(0, 1)
        return whole if self.packed is None else self.packed.whole(whole)

    def whole(self, found: Tensor) -> Tensor:
        """(items, patches, ...) of what was read of the tokens that are left.

        A merged patch has what its window has.
        """
        if self.merged is None or self.merged.merge_into is None:
            return found
        slot = self.merged.merge_into.to(found.device)
        return found.gather(1, slot.view(*slot.shape, *[1] * (found.ndim - 2)).expand(-1, -1, *found.shape[2:]))

    def owners(self, patches: int) -> Tensor:
        """(patches,) long, for every patch of all items the patch that names its merged window (or itself)."""
        if self.merged is None or self.merged.merge_into is None:
            return torch.arange(patches, dtype=torch.long, device="cpu")
        owner = self.merged.keep.gather(1, self.merged.merge_into)
        base = torch.arange(len(owner), dtype=torch.long, device=owner.device)[:, None] * owner.shape[1]
        return (owner + base).flatten()
