"""Local spatial merging: square windows of similar patches become their mean.

Source: MustDrop (arXiv 2411.10803), vision encoding stage. Similarity of a window is the mean cosine over its pairs of
distinct tokens; a window merges if it reaches the threshold. In a video a window may reach over adjacent frames.

A grid is (rows, columns), or (frames, rows, columns); a window is its side, or (frames, rows, columns).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import constant, count_up, every, numbers, sent
from mustdrop.errors import ConfigError
from mustdrop.rules.ranking import rank_descending
from mustdrop.selection import Selection

Sides = tuple[int, ...]


def _solid(grid: Sides, window: int | Sides) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and window with all three sides; an image is one frame, and no window is deeper than that there."""
    frames, rows, columns = grid if len(grid) == 3 else (1, *grid)
    deep, high, wide = (1, window, window) if isinstance(window, int) else window
    return (frames, rows, columns), (1 if frames == 1 else deep, high, wide)


def window_index(grid: Sides, window: int | Sides, device: torch.device | None = None) -> Tensor:
    """Token indices of each complete window of a raster grid, (W, tokens per window) long.

    Incomplete windows at the border are left out, so a grid that is smaller than one window has none.
    """
    (frames, rows, columns), (deep, high, wide) = _solid(grid, window)
    t, h, w = frames // deep, rows // high, columns // wide
    tokens = torch.arange(frames * rows * columns, dtype=torch.long, device=device).view(frames, rows, columns)
    tokens = tokens[: t * deep, : h * high, : w * wide]
    return rearrange(tokens, "(t c) (h a) (w b) -> (t h w) (c a b)", c=deep, a=high, b=wide)


def check_window(grid: Sides, window: int | Sides) -> None:
    """Raise `ConfigError` for a grid that is smaller than one window."""
    (frames, rows, columns), (deep, high, wide) = _solid(grid, window)
    if frames >= deep and rows >= high and columns >= wide:
        return
    has = f"{rows}x{columns} patches" if frames == 1 else f"{frames} frames of {rows}x{columns} patches"
    needs = f"{high}x{wide}" if deep == 1 else f"{deep} frames of {high}x{wide}"
    raise ConfigError(
        f"the {'image' if frames == 1 else 'video'} has {has}, smaller than one window of {needs}: use a smaller "
        "window, or leave strict=True out: then such a picture is not merged."
    )


def _centre(grid: Sides, window: int | Sides) -> int:
    """Place of the centre among the tokens of a window."""
    _, (deep, high, wide) = _solid(grid, window)
    return ((deep - 1) // 2 * high + (high - 1) // 2) * wide + (wide - 1) // 2


def window_similarity(x: Tensor, grid: Sides, window: int | Sides) -> Tensor:
    """Mean pairwise cosine similarity of the tokens of each window.

    Args:
        x: (B, N, C) tokens in raster order of `grid`.
        grid: sides of the grid, with N tokens in all.
        window: of at least two tokens.

    Returns:
        (B, W) float32, windows in raster order; none where the grid is smaller than one.
    """
    if x.shape[1] != math.prod(grid):
        sides = "x".join(map(str, grid))
        raise ConfigError(f"got {x.shape[1]} tokens for a grid of {sides} = {math.prod(grid)} patches.")
    index = sent(_windows(grid, window), x.device)
    if not len(index):
        return torch.zeros(x.shape[0], 0, dtype=torch.float32, device=x.device)
    return kernels.window_similarity(x, index)


def merge_windows(
    similarity: Tensor,
    grid: Sides,
    window: int | Sides,
    threshold: float,
    at_least: Tensor | None = None,
    released: bool = False,
) -> Selection:
    """Merge the windows whose similarity reaches `threshold`.

    Args:
        similarity: (B, W) from `window_similarity`.
        grid: sides of the grid.
        window: as in `window_similarity`.
        threshold: similarity in [-1, 1] from which a window merges.
        at_least: (B,) long, tokens that must remain; the least similar windows stay unmerged.
        released: reproduce the authors' code: every row merges as many windows as the row with the fewest, and merged
            windows come first, most similar first.

    Returns:
        `Selection` over the patches of the grid. A merged window is named by its centre patch.
    """
    batch, windows = similarity.shape
    total, device = math.prod(grid), similarity.device
    index = window_index(grid, window, device)
    rank = rank_descending(similarity)
    count = (similarity >= threshold).sum(1)
    if at_least is not None:
        count = count.minimum((total - at_least.to(device)).clamp(min=0) // (index.shape[1] - 1))
    if released:
        count = count.min().expand(batch)
    merged = rank < count[:, None]

    itself = torch.arange(total, dtype=torch.long, device=device).expand(batch, -1)
    centre = index[:, _centre(grid, window)].expand(batch, -1)
    target = torch.where(merged[..., None], centre[..., None], index)
    representative = itself.scatter(1, index.flatten().expand(batch, -1), target.flatten(1))
    order = itself
    if released:  # merged windows take the places before all other patches
        order = (windows + itself).scatter(1, centre, torch.where(merged, rank, windows + centre))
    selection = Selection.from_mask(representative == itself, order)
    slot = selection.assignment(total)
    return Selection(selection.keep, selection.valid, slot.gather(1, representative))


def merge_most(
    similarity: Tensor, grid: Sides, window: int | Sides, counts: Sequence[int]
) -> tuple[Selection, Tensor, Tensor]:
    """Merge the most similar windows of each row, as many as `counts` says; nothing waits for the device.

    Args:
        similarity: (B, W) from `window_similarity`.
        grid: sides of the grid.
        window: as in `window_similarity`.
        counts: per row, windows that merge, 0 to W; ties go to the first.

    Returns:
        `Selection` over the patches of the grid, the patch that names each, (B, N) long, and which name themselves,
        (B, N) bool. A merged window is named by its centre patch.
    """
    total, device, tables = math.prod(grid), similarity.device, _tables(grid, window)
    size = window_size(grid, window)
    wanted = numbers(counts, device)
    flags = kernels.select(similarity, every(tuple(similarity.shape), device), wanted, 0)[1]
    of, centre = sent(tables[0], device), sent(tables[1], device)
    merged = flags[:, of] if tables[2] else torch.nn.functional.pad(flags, (0, 1))[:, of]
    itself = count_up(len(counts), total, device)
    into = torch.where(merged, centre, itself)
    alive = into == itself
    left = [total - n * (size - 1) for n in counts]
    most = max(left, default=total)
    zeros = constant("zeros", device, lambda: torch.zeros(1, 1, dtype=torch.float32, device=device))
    keep = kernels.select(zeros.expand_as(alive), alive, numbers(left, device), most)[0]
    slot = (alive.cumsum(1) - 1).gather(1, into)
    if min(left, default=total) == most:
        return Selection(keep, every(tuple(keep.shape), device), slot), into, alive
    # what is left of each row moves to the front
    place = count_up(len(counts), most, device)
    valid = place < numbers(left, device)[:, None]
    keep = keep.gather(1, (place + (most - numbers(left, device))[:, None]).clamp(max=most - 1))
    return Selection(keep.masked_fill(~valid, 0), valid, slot), into, alive


def window_count(grid: Sides, window: int | Sides) -> int:
    """Complete windows of a grid."""
    return math.prod(side // own for side, own in zip(*_solid(grid, window), strict=True))


def window_size(grid: Sides, window: int | Sides) -> int:
    """Tokens that each of them holds."""
    return math.prod(_solid(grid, window)[1])


@functools.lru_cache(maxsize=64)
def _windows(grid: Sides, window: int | Sides) -> np.ndarray:
    """`window_index`, once for the grids that a model sees all day."""
    return window_index(grid, window, torch.device("cpu")).numpy()


@functools.lru_cache(maxsize=64)
def _tables(grid: Sides, window: int | Sides) -> tuple[np.ndarray, np.ndarray, bool]:
    """Of each token the window that it lies in (W outside of all) and that one's centre, and whether all lie in one."""
    index = _windows(grid, window)
    of = np.full(math.prod(grid), len(index), dtype=np.int64)
    centre = np.arange(math.prod(grid), dtype=np.int64)
    of[index] = np.arange(len(index))[:, None]
    centre[index] = index[:, _centre(grid, window)][:, None]
    return of, centre, bool((of < len(index)).all())
