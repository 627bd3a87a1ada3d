"""Tables over features: the patches of each, its place, what was read of it, and what it has merged into."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mustdrop.budget import share_out
from mustdrop.errors import MustDropError
from mustdrop.indices import on
from mustdrop.layout import Layout
from mustdrop.pruners import Read
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.runtime.vision.media_plan import MediaPlan


def patches_left(layouts: Sequence[Layout], most: Sequence[int], item: int) -> list[int]:
    """Patches that each item of the encoder's batch must have after merging, for its medium to have `most` features.

    Patches that become no feature (what a model cuts away from tiles) may stay unmerged, so they do not count. Items
    that become no feature need none; those after the last one that does are left out.
    """
    left: dict[int, int] = {}
    for layout, number in zip(layouts, most, strict=True):
        items, counts = layout.items(item)
        room = max(0, min(number, layout.size) - (layout.size - layout.in_picture))
        parts = share_out(min(room, sum(counts)), counts) if items else []
        for i, part, n in zip(items, parts, counts, strict=True):
            left[i] = part + item - n
    return [left.get(i, 0) for i in range(max(left, default=-1) + 1)]


def of_features(run: EncoderRun, read: Read, patches: Tensor, as_read: bool = False) -> Tensor:
    """(F,) or (F, D), the mean over each feature's patches (F, k) of what was read; 0 for structural rows.

    `as_read` says that each feature is the patch of its own number.
    """
    found = run.reading(read)
    if found is None:
        raise MustDropError(
            f"encoder layer {read.layer} did not run, so there is nothing to read from it: choose another layer."
        )
    if as_read:
        return on(found, patches.device)[: len(patches)]
    real = patches >= 0
    values = found.to(patches.device)[patches.clamp(min=0)]
    real = real.view(*real.shape, *[1] * (values.ndim - 2))
    return (values * real).sum(1) / real.sum(1).clamp(min=1)


def places(layout: Layout) -> np.ndarray:
    """(4, N) long: frame (over all grids), row, column, and first frame of the grid, of each feature; structural 0."""
    cells, structural = layout.cell_table, layout.gaps
    out = np.zeros((4, layout.size), dtype=np.int64)
    first = 0
    for (frames, rows, columns), start in zip(layout.grids, layout.offsets, strict=False):
        if not frames * rows * columns:
            continue
        cell = cells - start
        inside = (cell >= 0) & (cell < frames * rows * columns) & ~structural
        cell = cell[inside]
        frame, row, column = cell // (rows * columns) + first, cell // columns % rows, cell % columns
        out[:, inside] = np.stack([frame, row, column, np.full_like(cell, first)])
        first += frames
    return out


def stacked(layouts: Sequence[Layout]) -> np.ndarray:
    """(F, k) encoder patches of the features of all media, -1 fills up."""
    tables = [layout.patch_table for layout in layouts]
    width = max((table.shape[1] for table in tables), default=1)
    if tables and all(table.shape[1] == width for table in tables):
        return tables[0] if len(tables) == 1 else np.concatenate(tables)
    return np.concatenate([np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=-1) for t in tables])


def plain(patches: np.ndarray) -> bool:
    """Whether each feature is the patch of its own number, so that nothing has to be looked up."""
    return patches.shape[1] == 1 and bool((patches[:, 0] == np.arange(len(patches))).all())


def owners(run: EncoderRun, patches: Tensor, as_read: bool = False) -> Tensor:
    """(F,) long, the feature that names the window which each feature became part of inside the encoder.

    It is the feature that holds the patch that names the window; where the model cuts that one away (padding of tiles),
    the first of the window's features that it leaves.

    Args:
        run: what the encoder did.
        patches: (F, k) long, the patches of each feature; -1 is none.
        as_read: whether each feature is the patch of its own number: see `plain`.
    """
    number = len(patches)
    if as_read and run.merged is not None and run.merged.merge_into is not None:
        return run.owners(run.merged.merge_into.numel())[:number]
    index = torch.arange(number, dtype=torch.long, device=patches.device)
    if run.packed is not None and run.merges_packed:
        owner = run.packed.owner.to(patches.device)
        return torch.where(owner < 0, index, owner)
    if run.merged is None or run.merged.merge_into is None:
        return index
    total = run.merged.merge_into.numel()
    key = run.owners(total).to(patches.device)[patches[:, 0].clamp(min=0)]
    holds = (patches == key[:, None]).any(1)
    rank = torch.where(holds, index, index + number)
    structural = patches[:, 0] < 0
    key = key.masked_fill(structural, total)  # rows of no patch have a place of their own
    table = torch.full((total + 1,), 2 * number, dtype=torch.long, device=patches.device)
    table = table.scatter_reduce(0, key, rank, "amin")
    return torch.where(structural, index, table[key] % number)


def named(owner: Tensor, plan: MediaPlan) -> Tensor:
    """What names each merged window, so that no token that must be there is gone.

    A feature that ends a prompt names the window that it is part of; one that a mask hides names none that others are
    part of.

    Args:
        owner: (F,) long, for each feature of all media the one that names its window.
        plan: what is asked of each medium.
    """
    if plan.by_shapes:
        return owner
    index, device = torch.arange(len(owner), dtype=torch.long, device=owner.device), owner.device
    turn = (owner != index).long()  # whose turn it is to name: the end, what does so far, others that are seen
    if plan.shown is not None:
        turn = torch.where(torch.cat(list(plan.shown)).to(device), turn, 2)
    for i, start in enumerate(itertools.accumulate((layout.size for layout in plan.layouts), initial=0)):
        if i in plan.ends:
            turn[start + plan.ends[i]] = -1
    key = (turn + 1) * len(owner) + index
    best = torch.full_like(owner, 4 * len(owner)).scatter_reduce(0, owner, key, "amin")
    return best[owner] % len(owner)
