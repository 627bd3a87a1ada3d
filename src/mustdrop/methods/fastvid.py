"""FastVID: attention, density merging per segment (arXiv 2503.11187). For video."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import count_up, highest, numbers
from mustdrop.indices import take
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.pruners.weighing import ImportanceKnob, WeighingRule, importance_of
from mustdrop.rules.clusters import density_peaks, tie_noise
from mustdrop.rules.groups import best_in_groups, largest_remainder, share_of, sizes, the_rest
from mustdrop.rules.segments import frame_means, segments, videos

CONTEXT, CUT, FEWEST, STRIDE, OWN = 0.4, 0.9, 8, 4, 0.6
NEIGHBOURS = 4


class SalientAndContext(ComparingRule, WeighingRule):
    """The most attended features of each frame; the rest of a segment joins dense features of every few frames.

    Attributes:
        importance: what takes the place of the attention.
        context: share of a frame's budget that goes to the contexts of its segment, in [0, 1].
        cut: cosine of two frames' means below which a segment ends.
        fewest: least number of segments, or the number of frames if that is smaller.
        stride: frames from one frame with contexts to the next, counted from the end of the segment.
        own: least part of a context that is its own value, in [0, 1].
        seed: of the noise that breaks ties between densities; None gives them to the lower index.
        geometry: how features are compared; the mean is that of all frames, and changes no density. Segments are cut by
            the frames' means as they are: around the mean of a still video nothing but noise is left.
    """

    by_view: ClassVar[bool] = False
    context: float = Field(CONTEXT, ge=0, le=1)
    cut: float = Field(CUT, ge=-1, le=1)
    fewest: int = Field(FEWEST, ge=1)
    stride: int = Field(STRIDE, ge=1)
    own: float = Field(OWN, ge=0, le=1)
    seed: int | None = None

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`. All frames have the same share; each grid of an image is a video of one frame."""
        assert count is not None
        values, attention = self.centred(seen), self.weighed(self.importance.score(seen), seen)
        if not highest(seen.frame):
            pictures = [self._of_picture(*row, count) for row in zip(values, attention, seen.frame, strict=True)]
            keep, into = map(torch.stack, zip(*pictures, strict=True))
            return Selection(keep, merge_into=into, blend=lambda values: blended(values, keep, into, self.own))
        means, size = frame_means(seen.values, seen.frame)
        parts = segments(means, videos(seen.frame, seen.first, size.shape[1]), self.cut, self.fewest)
        budget = largest_remainder(size, count, size)
        rows = zip(values, attention, seen.frame, parts, budget, strict=True)
        keep, into = map(torch.stack, zip(*(self._of_video(*row) for row in rows), strict=True))
        return Selection(keep, merge_into=into, blend=lambda values: blended(values, keep, into, self.own))

    def _of_picture(self, values: Tensor, attention: Tensor, frame: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As `_of_video`, of one frame: how many stay of which kind is known, so nothing waits for the device."""
        device, context = frame.device, share_of(count, self.context)
        own = count - context
        keep = best_in_groups(attention[None], frame[None], numbers([own], device)[None], own)[0]
        target = torch.full_like(frame, -1).scatter(0, keep, keep)
        if context:
            others = the_rest(keep, len(frame))
            noise = None if self.seed is None else tie_noise(len(others), self.seed, device)
            centres = others[density_peaks(values[others], context, noise, NEIGHBOURS)[0]]
            _, place = kernels.best_match(values[others][None], values[centres][None])
            target = target.scatter(0, others, centres[place[0]]).scatter(0, centres, centres)
            keep = torch.cat([keep, centres]).sort().values
        column = torch.full_like(frame, -1).scatter(0, keep, count_up(1, count, device)[0])
        return keep, torch.where(target >= 0, column[target.clamp(min=0)], -1)

    def _of_video(
        self, values: Tensor, attention: Tensor, frame: Tensor, segment: Tensor, budget: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(M,) what stays and (N,) what each feature joins, of one video."""
        context = (budget * self.context + 1e-6).long()
        own = budget - context
        salient = best_in_groups(attention[None], frame[None], own[None], int(own.sum()))[0]
        rest = torch.ones_like(frame, dtype=torch.bool)
        rest[salient] = False
        target = torch.full_like(frame, -1)
        target[salient] = salient
        for part in range(int(segment.max()) + 1):
            mine = rest & (segment[frame] == part)
            wanted = int(context[segment == part].sum())
            if not wanted:
                continue
            centres = self._centres(values, frame, mine, int((segment == part).nonzero()[-1]), wanted)
            others = mine.nonzero()[:, 0]
            _, place = kernels.best_match(values[others][None], values[centres][None])
            target[others] = centres[place[0]]
            target[centres] = centres
        keep = (target == torch.arange(len(target), dtype=torch.long, device=target.device)).nonzero()[:, 0]
        column = torch.full_like(frame, -1)
        column[keep] = torch.arange(len(keep), dtype=torch.long, device=keep.device)
        return keep, torch.where(target >= 0, column[target.clamp(min=0)], -1)

    def _centres(self, values: Tensor, frame: Tensor, mine: Tensor, last: int, wanted: int) -> Tensor:
        """(wanted,) long, density peaks among the features `mine` of every few frames up to the last one."""
        stride = self.stride
        while int((anchored := mine & ((last - frame) % stride == 0)).sum()) < wanted:
            stride -= 1  # too few features there: frames between them help out
        size = sizes(frame[anchored][None], last + 1)
        budget = largest_remainder((size > 0).float(), wanted, size)[0]
        found = []
        for t, number in enumerate(budget.tolist()):
            if number:
                own = (anchored & (frame == t)).nonzero()[:, 0]
                noise = None if self.seed is None else tie_noise(len(own), self.seed, frame.device)
                found.append(own[density_peaks(values[own], number, noise, NEIGHBOURS)[0]])
        return torch.cat(found)


def blended(values: Tensor, keep: Tensor, into: Tensor, own: float) -> Tensor:
    """(B, M, C): each kept feature and the mean of the n that join it, the larger of 1 / (n + 1) and `own` its own.

    Args:
        values: (B, N, C).
        keep: (B, M) long.
        into: (B, N) long, column of `keep` that each feature joins; -1: none.
        own: least share of its own value.
    """
    mine = take(values, keep, 1, padded=False)
    joined = into.scatter(1, keep, -1)
    count = torch.zeros_like(keep).scatter_add_(1, joined.clamp(min=0), (joined >= 0).long())
    mean = kernels.merge_tokens(values, joined, keep.shape[1])
    share = (1 / (count + 1).float()).clamp(min=own)[..., None]
    return torch.where(count[..., None] > 0, share * mine + (1 - share) * mean, mine)


class FastVid(Comparing, Recipe):
    """Salient features and contexts of segments; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        context: share of a frame's budget that goes to the contexts of its segment.
        cut: cosine of two frames' means below which a segment ends; the paper has 0.84 for Qwen.
        fewest: least number of segments, or the number of frames if that is smaller.
        stride: frames from one frame with contexts to the next.
        own: least part of a context that is its own value.
        seed: of the noise that breaks ties between densities; None gives them to the lower index.
        importance: "attention" of the encoder; or in its place the likeness with the "question", what is "distinct"
            from the mean, the folder of a scorer, a module, or an `Importance` of your own.
    """

    keep: Budget = DEFAULT_KEEP
    context: float = Field(CONTEXT, ge=0, le=1)
    cut: float = Field(CUT, ge=-1, le=1)
    fewest: int = Field(FEWEST, ge=1)
    stride: int = Field(STRIDE, ge=1)
    own: float = Field(OWN, ge=0, le=1)
    seed: int | None = None
    importance: ImportanceKnob = "attention"

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = SalientAndContext(
            importance=importance_of(self.importance),
            context=self.context,
            cut=self.cut,
            fewest=self.fewest,
            stride=self.stride,
            own=self.own,
            seed=self.seed,
            geometry=self.geometry,
        )
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
