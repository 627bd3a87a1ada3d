"""Local spatial merging: square windows of similar patches become their mean.

Source: MustDrop (arXiv 2411.10803), vision encoding stage. Similarity of a window is the mean cosine over its pairs of
distinct tokens; a window merges if it reaches the threshold.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.errors import ConfigError
from mustdrop.rules.ranking import rank_descending
from mustdrop.selection import Selection


def window_index(grid: tuple[int, int], window: int, device: torch.device | None = None) -> Tensor:
    """Token indices of each complete window of a raster grid, (W, window**2) long.

    Incomplete windows at the border are left out.

    Raises:
        ConfigError: the grid is smaller than one window.
    """
    h, w = grid[0] // window, grid[1] // window
    if not h or not w:
        raise ConfigError(
            f"the image has {grid[0]}x{grid[1]} patches, smaller than one window of "
            f"{window}x{window}: use a smaller window."
        )
    tokens = torch.arange(grid[0] * grid[1], device=device).view(grid)[: h * window, : w * window]
    return rearrange(tokens, "(h a) (w b) -> (h w) (a b)", a=window, b=window)


def window_similarity(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Mean pairwise cosine similarity of the tokens of each window.

    The closed form (|sum of unit vectors|^2 - sum of their squared norms) / (n (n - 1)) needs no pairwise products.

    Args:
        x: (B, N, C) tokens in raster order of `grid`.
        grid: (rows, columns), rows * columns == N.
        window: side of a window, at least 2.

    Returns:
        (B, W) float32, windows in raster order.
    """
    if x.shape[1] != grid[0] * grid[1]:
        raise ConfigError(f"got {x.shape[1]} tokens for a grid of {grid[0]}x{grid[1]} = {grid[0] * grid[1]} patches.")
    unit = torch.nn.functional.normalize(x.float(), dim=-1)[:, window_index(grid, window, x.device)]  # (B, W, n, C)
    n = window * window
    return (unit.sum(2).square().sum(-1) - unit.square().sum((2, 3))) / (n * (n - 1))


def merge_windows(
    similarity: Tensor,
    grid: tuple[int, int],
    window: int,
    threshold: float,
    at_least: Tensor | None = None,
    released: bool = False,
) -> Selection:
    """Merge the windows whose similarity reaches `threshold`.

    Args:
        similarity: (B, W) from `window_similarity`.
        grid: (rows, columns) of the patches.
        window: side of a window.
        threshold: similarity in [-1, 1] from which a window merges.
        at_least: (B,) long, tokens that must remain; the least similar windows stay unmerged.
        released: reproduce the authors' code: every row merges as many windows as the row with the fewest, and merged
            windows come first, most similar first.

    Returns:
        `Selection` over the rows * columns patches. A merged window is named by its centre patch.
    """
    batch, windows = similarity.shape
    total, device = grid[0] * grid[1], similarity.device
    index = window_index(grid, window, device)
    rank = rank_descending(similarity)
    count = (similarity >= threshold).sum(1)
    if at_least is not None:
        count = count.minimum((total - at_least.to(device)).clamp(min=0) // (window * window - 1))
    if released:
        count = count.min().expand(batch)
    merged = rank < count[:, None]

    itself = torch.arange(total, device=device).expand(batch, -1)
    centre = index[:, (window - 1) // 2 * (window + 1)].expand(batch, -1)
    target = torch.where(merged[..., None], centre[..., None], index)
    representative = itself.scatter(1, index.flatten().expand(batch, -1), target.flatten(1))
    order = itself
    if released:  # merged windows take the places before all other patches
        order = (windows + itself).scatter(1, centre, torch.where(merged, rank, windows + centre))
    selection = Selection.from_mask(representative == itself, order)
    slot = selection.assignment(total)
    return Selection(selection.keep, selection.valid, slot.gather(1, representative))
