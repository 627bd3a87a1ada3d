"""Cells of a picture that the cells before them predict: what repeats a neighbour, or a picture before.

Source: PixelPrune (arXiv 2604.00886). The predictor is that of LOCO-I (JPEG-LS): left, above and above-left decide
which neighbour a cell is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["max", "mae", "rmse"]


def similar(a: Tensor, b: Tensor, tolerance: float, metric: Metric = "max") -> Tensor:
    """(...) bool, whether vectors (..., D) differ by no more than `tolerance`: at most, on average, or squared."""
    apart = (a - b).abs()
    if metric == "max":
        return apart.amax(-1) <= tolerance
    return (apart.mean(-1) if metric == "mae" else apart.square().mean(-1).sqrt()) <= tolerance


def unpredicted(
    frames: Tensor, tolerance: float = 0.0, metric: Metric = "max", before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which cells must be seen, and what the others are taken for.

    A cell is predicted if it is similar to what its neighbours predict, or to the same place of the frame before. What
    is compared with is what was reconstructed there: the cell itself if it is kept, else what it was taken for. So
    differences do not add up over a run of cells.

    Args:
        frames: (T, H, W, D) float, cells of the frames of one picture or video.
        tolerance: how much similar cells may differ; 0: not at all.
        metric: how the difference is measured.
        before: (H, W, D), the last frame of what came before, as it was reconstructed; None: nothing did. The first
            cell of the first frame is kept always.

    Returns:
        (kept, reconstructed): (T, H, W) bool and (T, H, W, D).
    """
    if tolerance:
        return _unpredicted_closely(frames, tolerance, metric, before)
    # what was reconstructed is what was there
    past = frames[:-1] if before is None else torch.cat([before[None], frames])[: len(frames)]
    kept = _unpredicted_exactly(frames)
    if len(past):
        kept[len(frames) - len(past) :] &= ~(frames[-len(past) :] == past).all(-1)
    kept[0, 0, 0] = True
    return kept, frames


def _unpredicted_closely(
    frames: Tensor, tolerance: float, metric: Metric, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `unpredicted`, diagonal by diagonal: the cells of one need those of the two before it alone."""
    count, high, wide, _ = frames.shape
    kept = torch.ones(count, high, wide, dtype=torch.bool, device=frames.device)
    made, past = frames.clone(), before
    for t in range(count):
        for diagonal in range(high + wide - 1):
            first = max(0, diagonal - wide + 1)
            row = torch.arange(first, min(high, diagonal + 1), dtype=torch.long, device=frames.device)
            column = diagonal - row
            here = frames[t, row, column]
            guess, known = _guess(made[t], row, column, tolerance, metric)
            found = known & similar(here, guess, tolerance, metric)
            if past is not None:
                again = similar(here, past[row, column], tolerance, metric) & ~found
                guess = torch.where(again[:, None], past[row, column], guess)
                found = found | again
            if not t and not diagonal:
                found = torch.zeros_like(found)
            kept[t, row, column] = ~found
            made[t, row, column] = torch.where(found[:, None], guess, here)
        past = made[t]
    return kept, made


def _unpredicted_exactly(frames: Tensor) -> Tensor:
    """(T, H, W) bool, cells that differ from what their neighbours predict."""

    def same(a: Tensor, b: Tensor) -> Tensor:
        return (a == b).all(-1)

    kept = torch.ones(frames.shape[:3], dtype=torch.bool, device=frames.device)
    beside, below = same(frames[:, :, 1:], frames[:, :, :-1]), same(frames[:, 1:], frames[:, :-1])
    kept[:, 0, 1:], kept[:, 1:, 0] = ~beside[:, 0], ~below[:, :, 0]
    # above-left = left, and it is not above: an edge that runs down, and the cell above goes on
    down = below[:, :, :-1] & ~beside[:, :-1]
    kept[:, 1:, 1:] = ~torch.where(down, below[:, :, 1:], beside[:, 1:])
    return kept


def _guess(made: Tensor, row: Tensor, column: Tensor, tolerance: float, metric: Metric) -> tuple[Tensor, Tensor]:
    """((n, D), (n,) bool): what the neighbours of cells predict from what was made of (H, W, D), and whether any do."""
    left = made[row, (column - 1).clamp(min=0)]
    above = made[(row - 1).clamp(min=0), column]
    corner = made[(row - 1).clamp(min=0), (column - 1).clamp(min=0)]
    down = similar(corner, left, tolerance, metric) & ~similar(corner, above, tolerance, metric)
    down = (down & (column > 0)) | (column == 0)
    return torch.where((down & (row > 0))[:, None], above, left), (row > 0) | (column > 0)


def unpredicted_media(
    media: Sequence[Tensor], tolerance: float = 0.0, metric: Metric = "max", previous: bool = True
) -> list[Tensor]:
    """Per medium (T, H, W) bool, cells that must be seen.

    Args:
        media: the pictures and videos of a prompt in their order, (T, H, W, D) each.
        tolerance: see `unpredicted`.
        metric: see `unpredicted`.
        previous: whether the same place of the frame before, or of the picture before if that is as large, predicts a
            cell; else each frame is looked at alone.
    """
    kept, before = [], None
    for frames in media:
        if not previous:
            alone = [unpredicted(frame[None], tolerance, metric)[0] for frame in frames]
            kept.append(torch.cat(alone) if alone else frames.new_zeros(frames.shape[:3], dtype=torch.bool))
            continue
        fits = before is not None and before.shape == frames.shape[1:]
        seen, made = unpredicted(frames, tolerance, metric, before if fits else None)
        kept.append(seen)
        before = made[-1] if len(made) else before
    return kept
