"""DyCoke: what changed since earlier frames (arXiv 2411.15024), its vision stage. For video."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from mustdrop.constants import highest, on_host
from mustdrop.errors import ConfigError
from mustdrop.indices import take
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.rules.baselines import uniform_scores
from mustdrop.rules.groups import rank_in_group, sizes

# Every fourth frame stays whole.
GROUP = 4
# Groups double until thinned frames keep this share of their features.
SPARSEST = 0.1


class TemporalPruning(ComparingRule):
    """Every `group`-th frame stays whole; of the others stay the features least like the same place of another frame.

    In a group of four, frames 1 and 2 are compared with frame 0, and frame 3 with frame 2. Longer groups go on like
    that: a frame is compared with the one whose number lacks its lowest binary digit 1.

    A budget that is too small for the whole frames makes groups longer, twice as long each time. One that is too small
    for a single whole frame thins the first frame as much as the others, by an even grid, because it has nothing to be
    compared with. That is also what becomes of an image.

    Attributes:
        group: frames per whole frame, a power of two.
        geometry: how features are compared; the mean is that of all places and frames.
    """

    by_view: ClassVar[bool] = False
    group: int = Field(GROUP, ge=2)

    @field_validator("group")
    @classmethod
    def _power(cls, group: int) -> int:
        if group & (group - 1):
            raise ConfigError(f"group={group}: expected a power of two (2, 4, 8, ...), because groups are halved.")
        return group

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`. Thinned frames keep equally many."""
        assert count is not None
        number = seen.frame if seen.first is None else seen.frame - seen.first
        earlier = earlier_features(seen, number)
        values = self.centred(seen)
        there = take(values, earlier, 1)
        change = (-torch.cosine_similarity(values, there, dim=-1)).masked_fill(earlier < 0, torch.inf)
        place = rank_in_group(torch.zeros_like(change), seen.frame)
        even = uniform_scores(place.shape[1], place.device).float()[place]
        rank = rank_in_group(torch.where(number == 0, even, change), seen.frame)
        size = sizes(seen.frame, highest(seen.frame) + 1).gather(1, seen.frame)
        last = on_host(seen.frame) - (0 if seen.first is None else on_host(seen.first))
        group = self.groups(number, count, int(last.max()))[:, None]
        whole = (group > 0) & (number % group.clamp(min=1) == 0)
        return Selection.best(-((rank + 0.5) / size).masked_fill(whole, 0), count)

    def groups(self, number: Tensor, count: int, last: int) -> Tensor:
        """(B,) long, frames per whole frame; 0 where the budget is too small for any.

        Args:
            number: (B, N) long, of the frame that each feature lies in.
            count: features that stay.
            last: the highest of the numbers.
        """
        found = torch.zeros_like(number[:, 0])
        length = self.group
        while True:
            whole = (number % length == 0).sum(1)
            fits = count - whole >= SPARSEST * (number.shape[1] - whole)
            found = torch.where((found == 0) & fits, length, found)
            if length > last:
                return found
            length *= 2


def earlier_features(seen: Features, number: Tensor) -> Tensor:
    """(B, N) long, the feature at the same place of the frame that each is compared with; -1 where there is none.

    Args:
        seen: where the features lie.
        number: (B, N) long, of the frame in its video: the one that it is compared with lacks its lowest digit 1.
    """
    high, wide = highest(seen.row) + 1, highest(seen.column) + 1
    place = seen.row * wide + seen.column
    table = torch.full((len(place), (highest(seen.frame) + 1) * high * wide), -1, dtype=torch.long, device=place.device)
    index = torch.arange(place.shape[1], dtype=torch.long, device=place.device).expand_as(place)
    table.scatter_(1, seen.frame * high * wide + place, index)
    back = number - (number & (number - 1))
    found = table.gather(1, (seen.frame - back) * high * wide + place)
    return found.masked_fill(number == 0, -1)


class DyCoke(Comparing, Recipe):
    """Keep every fourth frame, and of the others what changed; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens; the paper's rate of 0.7 is 0.475.
        geometry: "raw" compares features as they are; "centered" around the mean of all frames; "standardized" those of
            the encoder, around it and with channels of equal variance.
        group: frames per whole frame, a power of two; more where the budget is too small for as many whole frames.
    """

    keep: Budget = DEFAULT_KEEP
    group: int = Field(GROUP, ge=2)

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = TemporalPruning(group=self.group, geometry=self.geometry)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
