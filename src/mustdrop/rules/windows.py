"""Local spatial merging: square windows of similar patches become their mean.

Source: MustDrop (arXiv 2411.10803), vision encoding stage. Similarity of a window is the mean cosine over its pairs of
distinct tokens; a window merges if it reaches the threshold. In a video a window may reach over adjacent frames.

A grid is (rows, columns), or (frames, rows, columns); a window is its side, or (frames, rows, columns).
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from mustdrop import kernels
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
    index = window_index(grid, window, x.device)
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
