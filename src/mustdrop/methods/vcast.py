"""V-CAST: frame budgets by curvature, distinct tokens (arXiv 2603.27650)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionRule, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.rules.groups import best_in_groups, largest_remainder, spread
from mustdrop.rules.scores import min_max_in_groups
from mustdrop.rules.segments import frame_means, videos

TEMPERATURE = 0.7


class CurvedFrames(VisionRule):
    """The features unlike the mean of their frame and long; frames where the course of the video bends have more.

    Attributes:
        temperature: of the softmax over the frames.
    """

    by_view: ClassVar[bool] = False
    temperature: float = Field(TEMPERATURE, gt=0)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`. Each grid of an image is a video of one frame."""
        assert count is not None
        means, size = frame_means(seen.values, seen.frame)
        bend = curvature(means, videos(seen.frame, seen.first, means.shape[1]))
        weight = (bend / self.temperature).masked_fill(size == 0, -torch.inf).softmax(1) * size
        budget = largest_remainder(weight, count, size, least=1)
        unlike = 1 - torch.cosine_similarity(seen.values, spread(means, seen.frame), dim=2)
        length = min_max_in_groups(seen.values.norm(dim=2), seen.frame, means.shape[1])
        return Selection(best_in_groups(unlike + length, seen.frame, budget, count))


def curvature(means: Tensor, video: Tensor) -> Tensor:
    """(B, F), 1 - cosine of the step to a frame with the step from it; 1 for the first and the last of a video.

    Args:
        means: (B, F, C), of the frames.
        video: (B, F) long, which video each frame lies in.
    """
    direction = torch.nn.functional.normalize(means, dim=2)
    out = torch.ones_like(video, dtype=torch.float32)
    if means.shape[1] < 3:
        return out
    step = direction.diff(dim=1)
    bend = 1 - torch.cosine_similarity(step[:, :-1], step[:, 1:], dim=2)
    inside = (video[:, :-2] == video[:, 1:-1]) & (video[:, 1:-1] == video[:, 2:])
    out[:, 1:-1] = torch.where(inside, bend, 1.0)
    return out


class VCast(Recipe):
    """Keep what stands out of its frame, with more room where the video bends; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens; the paper's is 0.25.
        temperature: of the softmax over the frames.
    """

    keep: Budget = DEFAULT_KEEP
    temperature: float = Field(TEMPERATURE, gt=0)

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = CurvedFrames(temperature=self.temperature)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
