"""FlashVID: attention, diversity, trees over time (arXiv 2602.08024). For video."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import count_up, highest
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, LastRow, PrefillPruner, Read, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.importance import Attention, Importance
from mustdrop.pruners.vision_rules import LAST, Comparing, ComparingRule
from mustdrop.pruners.weighing import ImportanceKnob, WeighingRule, importance_of
from mustdrop.rules.clusters import density_peaks, tie_noise
from mustdrop.rules.diversity import farthest_first
from mustdrop.rules.groups import largest_remainder, members, share_of, sizes, the_rest
from mustdrop.rules.segments import frame_means, segments, videos

DIVERSE = 0.7  # of each frame's budget
LIKE, CUT, FEWEST = 0.8, 0.9, 8
NEIGHBOURS = 7
LAYERS, TAPER = (22,), 0.3  # of 32 layers: layer 20 of Qwen2's 28 is the first that runs on fewer tokens


class Received(Attention):
    """What a patch receives in the layer that features are read from, also where there is a CLS token."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """See `Importance.reads`."""
        return (Read(what="received", **LAST),)


class DiverseAndTrees(ComparingRule, WeighingRule):
    """Of each frame, attended features that differ; the rest joins its like in the frame before, and then clusters.

    Attributes:
        importance: what distances are multiplied with.
        diverse: share of a frame's budget that is chosen, in [0, 1]; what is left are clusters of the rest.
        like: cosine from which a feature joins one of the frame before.
        cut: cosine of two frames' means below which a segment ends, over which nothing joins.
        fewest: least number of segments, or the number of frames if that is smaller.
        seed: of the noise that breaks ties between densities; None gives them to the lower index.
        geometry: how features are compared, and what `like` is a cosine of; the mean is that of all frames. Segments
            are cut by the frames' means as they are: around the mean of a still video nothing but noise is left.
    """

    by_view: ClassVar[bool] = False
    importance: Importance = Received()
    diverse: float = Field(DIVERSE, ge=0, le=1)
    like: float = Field(LIKE, ge=-1, le=1)
    cut: float = Field(CUT, ge=-1, le=1)
    fewest: int = Field(FEWEST, ge=1)
    seed: int | None = None

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`. All frames have the same share; each grid of an image is a video of one frame."""
        assert count is not None
        values, attention = self.centred(seen), self.weighed(self.importance.positive(seen), seen)
        if not highest(seen.frame):
            pictures = [self._of_picture(*row, count) for row in zip(values, attention, seen.frame, strict=True)]
            keep, into = map(torch.stack, zip(*pictures, strict=True))
            return Selection.merged(keep, into, torch.ones(into.shape, dtype=torch.float32, device=into.device))
        means, size = frame_means(seen.values, seen.frame)
        parts = segments(means, videos(seen.frame, seen.first, size.shape[1]), self.cut, self.fewest)
        budget = largest_remainder(size, count, size)
        rows = zip(values, attention, seen.frame, parts, budget, strict=True)
        keep, into, weight = map(torch.stack, zip(*(self._of_video(*row) for row in rows), strict=True))
        return Selection.merged(keep, into, weight)

    def _of_picture(self, values: Tensor, attention: Tensor, frame: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """As `_of_video`, of one frame: how many stay of which kind is known, so nothing waits for the device."""
        device, n = frame.device, len(frame)
        chosen = min(share_of(count, self.diverse, up=True), count)
        kept = self._first(values, attention, chosen)
        clusters, others = count - chosen, the_rest(kept, n)
        keep, of_rest = kept, torch.full_like(others, -1)
        if clusters:
            noise = None if self.seed is None else tie_noise(len(others), self.seed, device)
            centres, member = density_peaks(values[others], clusters, noise, min(NEIGHBOURS, clusters))
            of_rest = others[centres[member]]
            keep = torch.cat([kept, others[centres]])
        keep = keep.sort().values
        column = torch.full_like(frame, -1).scatter(0, keep, count_up(1, count, device)[0])
        into = torch.where(of_rest >= 0, column[of_rest.clamp(min=0)], -1)
        return keep, column.scatter(0, others, into)

    @staticmethod
    def _first(values: Tensor, attention: Tensor, most: int) -> Tensor:
        """(most,) long, the features of one frame farthest from those chosen, distances times attention."""
        if not most or len(attention) == 1:
            return torch.zeros(most, dtype=torch.long, device=values.device)
        weight = attention / attention.amax().clamp(min=1e-30)
        return farthest_first(values[None], most, weight=weight[None])[0]

    def _of_video(
        self, values: Tensor, attention: Tensor, frame: Tensor, segment: Tensor, budget: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(M,) what stays, (N,) what each feature joins, (N,) with which weight, of one video."""
        chosen = (budget * self.diverse).ceil().long().minimum(budget)
        kept = self._diverse(values, attention, frame, chosen)
        rest = torch.ones_like(frame, dtype=torch.bool)
        rest[kept] = False
        clusters = int((budget - chosen).sum())
        root = self._trees(values, frame, segment, rest, clusters)
        weight = 1 / torch.bincount(root, minlength=len(root))[root].float()
        centre = self._clusters(values, frame, root, rest, clusters, weight)
        keep = torch.cat([kept, torch.unique(centre[centre >= 0])]).sort().values
        column = torch.full_like(frame, -1)
        column[keep] = torch.arange(len(keep), dtype=torch.long, device=keep.device)
        into = torch.where(rest, torch.where(centre >= 0, column[centre.clamp(min=0)], -1), column)
        return keep, into, weight

    @staticmethod
    def _diverse(values: Tensor, attention: Tensor, frame: Tensor, count: Tensor) -> Tensor:
        """(K,) long: in each frame, the features farthest from those chosen, distances times attention."""
        most = int(count.max())
        if not most:
            return frame[:0]
        index, real = members(frame, len(count))
        weight = attention[index].masked_fill(~real, 0)
        weight = weight / weight.amax(1, keepdim=True).clamp(min=1e-30)
        if index.shape[1] == 1:
            picks = torch.zeros_like(index)
        else:
            picks = farthest_first(values[index], most, real, count, weight=weight)
        found = index.gather(1, picks.clamp(min=0))
        return found[(picks >= 0) & (torch.arange(most, device=count.device, dtype=torch.long) < count[:, None])]

    def _trees(self, values: Tensor, frame: Tensor, segment: Tensor, rest: Tensor, fewest: int) -> Tensor:
        """(N,) long, the feature that each joins over time: links to the frame before, followed to their end.

        So many links are made at most that `fewest` trees are left, of the most alike.
        """
        parent = torch.arange(len(frame), dtype=torch.long, device=frame.device)
        likeness = torch.full(frame.shape, -torch.inf, dtype=torch.float32, device=frame.device)
        for t in range(1, len(segment)):
            mine, before = (rest & (frame == t)).nonzero()[:, 0], (rest & (frame == t - 1)).nonzero()[:, 0]
            if segment[t] != segment[t - 1] or not len(mine) or not len(before):
                continue
            similar, place = kernels.best_match(values[mine][None], values[before][None])
            parent[mine], likeness[mine] = before[place[0]], similar[0].float()
        order = likeness.argsort(descending=True, stable=True)
        allowed = torch.zeros_like(rest)
        allowed[order[: max(0, int(rest.sum()) - fewest)]] = True
        parent = torch.where(
            allowed & (likeness > self.like), parent, torch.arange(len(frame), dtype=torch.long, device=frame.device)
        )
        for _ in range(max(1, math.ceil(math.log2(len(segment) + 1)))):
            parent = parent[parent]
        return parent

    def _clusters(
        self, values: Tensor, frame: Tensor, root: Tensor, rest: Tensor, clusters: int, weight: Tensor
    ) -> Tensor:
        """(N,) long, the centre of the cluster that each feature of the rest ends up in; -1 where there is none."""
        out = torch.full_like(frame, -1)
        if not clusters:
            return out
        roots = rest & (root == torch.arange(len(root), dtype=torch.long, device=root.device))
        at = torch.full_like(frame, -1)
        number = int(roots.sum())
        at[roots] = torch.arange(number, dtype=torch.long, device=at.device)
        joined = torch.where(rest, at[root], -1)
        means = kernels.merge_tokens(values[None], joined[None], number, weight[None])[0]
        own = frame[roots]
        size = sizes(own[None], int(frame.max()) + 1)
        budget = largest_remainder(size, clusters, size)[0].tolist()
        centre = torch.full_like(at[roots], -1)
        for t, wanted in enumerate(budget):
            if not wanted:
                continue
            mine = (own == t).nonzero()[:, 0]
            noise = None if self.seed is None else tie_noise(len(mine), self.seed, frame.device)
            centres, member = density_peaks(means[mine], wanted, noise, min(NEIGHBOURS, wanted))
            centre[mine] = mine[centres[member]]
        places = roots.nonzero()[:, 0]
        of_root = torch.where(centre >= 0, places[centre.clamp(min=0)], -1)
        return torch.where(rest, of_root[joined.clamp(min=0)], -1)


class FlashVid(Comparing, Recipe):
    """Choose and merge frame by frame, and filter once late in the language model by the last word's attention.

    Attributes:
        keep: average retained tokens per layer of both stages, int or share; the paper's is 0.25 and less.
        diverse: share of a frame's budget that is chosen; what is left are clusters of the rest.
        like: cosine from which a feature joins one of the frame before.
        cut: cosine of two frames' means below which a segment ends.
        fewest: least number of segments, or the number of frames if that is smaller; the paper has 4 for Qwen.
        layers: layer of the language model after which the filter cuts; None is (22,) of 32, scaled to the model.
        taper: share of the tokens that enter which the filter leaves (the paper's for Qwen3-VL is 0.1); None filters
            nothing, so that the selection alone is left.
        seed: of the noise that breaks ties between densities; None gives them to the lower index.
        importance: "attention" of the encoder; or in its place the likeness with the "question", what is "distinct"
            from the mean, the folder of a scorer, a module, or an `Importance` of your own.
    """

    keep: Budget = DEFAULT_KEEP
    diverse: float = Field(DIVERSE, ge=0, le=1)
    like: float = Field(LIKE, ge=-1, le=1)
    cut: float = Field(CUT, ge=-1, le=1)
    fewest: int = Field(FEWEST, ge=1)
    layers: tuple[int, ...] | None = None
    taper: float | None = Field(TAPER, gt=0, le=1)
    seed: int | None = None
    importance: ImportanceKnob = "attention"

    def build(self) -> Method:
        """Vision and prefill socket share the budget."""
        rule = DiverseAndTrees(
            importance=importance_of(self.importance, attention=Received()),
            diverse=self.diverse,
            like=self.like,
            cut=self.cut,
            fewest=self.fewest,
            seed=self.seed,
            geometry=self.geometry,
        )
        if self.taper is None:
            return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
        return Method(
            vision=VisionStagePruner(window=None, key_share=0, score=rule, taper=self.taper),
            prefill=PrefillPruner(layers=self.layers, paper_layers=LAYERS, keep=self.keep, score=LastRow()),
        )
