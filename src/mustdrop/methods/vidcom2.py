"""VidCom2: unique frames get more tokens (arXiv 2505.14454). For video."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import highest
from mustdrop.indices import take
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionRule, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.rules.groups import rank_in_group, sizes

# Widths of the paper's Gaussian kernels; their values are added.
WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
TEMPERATURE = 0.01


class FrameUniqueness(VisionRule):
    """The features least like the mean of the video and of their frame; unusual frames have more of them.

    Attributes:
        temperature: of the softmax over the frames; the lower it is, the more the most unusual frame gets.
        channels: share of the channels, those that vary least, by which features are compared.
    """

    by_view: ClassVar[bool] = False
    temperature: float = Field(TEMPERATURE, gt=0)
    channels: float = Field(0.5, gt=0, le=1)

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`. Each grid of an image counts as a frame."""
        assert count is not None
        values, frame = self._steady(seen.values), seen.frame
        frames = highest(frame) + 1
        own = kernels.merge_tokens(values, frame, frames)
        of_video = _likeness(values, values.mean(1, keepdim=True))
        of_frame = _likeness(values, take(own, frame, 1, padded=False))
        size = sizes(frame, frames)
        usual = kernels.merge_tokens(of_video[..., None], frame, frames)[..., 0]
        room = self.weights(-usual, size) * size
        rank = rank_in_group(-(of_video + of_frame), frame)
        return Selection.best(_turns(rank, room.gather(1, frame)), count)

    def weights(self, uniqueness: Tensor, size: Tensor) -> Tensor:
        """How many tokens a frame gets, compared with the mean frame.

        Args:
            uniqueness: (B, F), higher is more unusual.
            size: (B, F) long, features of each frame; a frame without any gets nothing.

        Returns:
            (B, F), 1 on average.
        """
        there = size > 0
        logits = (uniqueness / self.temperature).masked_fill(~there, -torch.inf)
        return (1 + logits.softmax(1) - 1 / there.sum(1, keepdim=True)).masked_fill(~there, 0)

    def _steady(self, values: Tensor) -> Tensor:
        """Unit vectors (B, N, K) of the channels that vary least over the whole video."""
        number = max(1, round(values.shape[2] * self.channels))
        least = values.var(1, correction=0).argsort(dim=1, stable=True)[:, :number].sort(1).values
        taken = values.gather(2, least[:, None].expand(-1, values.shape[1], -1))
        return torch.nn.functional.normalize(taken, dim=-1)


def _likeness(values: Tensor, centre: Tensor) -> Tensor:
    """(B, N), sum of Gaussian kernels of the distance between features and their centre."""
    distance = (values - centre).square().sum(-1)
    return sum((torch.exp(distance / (-2 * width)) for width in WIDTHS), torch.zeros_like(distance))


def _turns(rank: Tensor, room: Tensor) -> Tensor:
    """(B, N) scores whose best `count` give each frame its share, for every count.

    A frame's share is room * x rounded, with the x at which the shares add up to the count; but each frame gets one
    feature before any gets two.

    Args:
        rank: (B, N) long, place of a feature in its frame.
        room: (B, N), share of its frame, up to a factor.
    """
    return torch.where(rank == 0, room.amax() * 2 + room, 0) - (rank + 0.5) / room * (rank > 0)


class VidCom2(Recipe):
    """Keep what is unlike its frame and its video, with more room for unusual frames; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens; the paper's is 0.25.
        temperature: of the softmax over the frames.
        channels: share of the channels, those that vary least, by which features are compared.
    """

    keep: Budget = DEFAULT_KEEP
    temperature: float = Field(TEMPERATURE, gt=0)
    channels: float = Field(0.5, gt=0, le=1)

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = FrameUniqueness(temperature=self.temperature, channels=self.channels)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
