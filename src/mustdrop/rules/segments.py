"""Frames of a video: their means, how alike neighbours are, and where the video is cut into segments."""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import highest
from mustdrop.rules.groups import sizes


def frame_means(values: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
    """Mean feature and number of features of each frame.

    Args:
        values: (B, N, C).
        frame: (B, N) long.

    Returns:
        (B, F, C), 0 where a frame has none; (B, F) long.
    """
    frames = highest(frame) + 1
    return kernels.merge_tokens(values, frame, frames), sizes(frame, frames)


def videos(frame: Tensor, first: Tensor | None, frames: int) -> Tensor:
    """(B, F) long, the first frame of the video that each frame lies in; a frame without features is its own.

    Args:
        frame: (B, N) long, frame of each feature.
        first: (B, N) long, first frame of its video; None: all are of one.
        frames: F.
    """
    if first is None:
        return frame.new_zeros(len(frame), frames)
    own = torch.arange(frames, dtype=torch.long, device=frame.device).expand(len(frame), -1)
    return own.scatter(1, frame, first)


def segments(means: Tensor, video: Tensor, below: float, fewest: int) -> Tensor:
    """Number of the segment that each frame lies in.

    Cut is between videos, wherever a frame resembles the next one less than `below`, and where it does least until
    there are `fewest` segments (as many as frames, if these are fewer). Ties go to the lower index.

    Args:
        means: (B, F, C), of the frames.
        video: (B, F) long, which video each frame lies in.
        below: cosine.
        fewest: segments.

    Returns:
        (B, F) long, from 0 and ascending.
    """
    likeness = torch.cosine_similarity(means[:, :-1], means[:, 1:], dim=2)
    ends = video[:, :-1] != video[:, 1:]
    order = likeness.masked_fill(ends, -torch.inf).argsort(dim=1, stable=True)[:, : max(0, fewest - 1)]
    cut = (ends | (likeness < below)).scatter(1, order, True)
    return torch.nn.functional.pad(cut.long().cumsum(1), (1, 0))
