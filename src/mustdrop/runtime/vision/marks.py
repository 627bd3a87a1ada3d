"""From what the encoder saw to what becomes of each feature: which are merged, which stay, which are protected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mustdrop.budget import share_out
from mustdrop.constants import where
from mustdrop.indices import HOST, on
from mustdrop.layout import Layout
from mustdrop.pruners import VisionStagePruner
from mustdrop.runtime.records import FlatMarks, Marks
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.runtime.vision.feature_tables import named, of_features, owners, stacked
from mustdrop.runtime.vision.media_plan import MediaPlan
from mustdrop.runtime.vision.selection import PlacedSelections, VisionSelector, Weigher


@dataclass(frozen=True)
class FeatureMarks:
    """The marks of each medium, and how features become those that enter the language model.

    Attributes:
        marks: one per medium.
        merge: (F,) long, for each feature of the call the one that takes its mean in; None if none is to be changed
            (windows that merged inside the encoder have equal features already).
        choice: what a rule decided, if its values are still to be written.
        flat: the marks of all media in one piece, on the device, where every count was known beforehand; else None.
    """

    marks: list[Marks]
    merge: Tensor | None
    choice: PlacedSelections | None = None
    flat: FlatMarks | None = None

    def write(self, features: Tensor) -> Tensor:
        """Features (F, C) of all media, merged, with NaN in the rows of those that are dropped."""
        if self.merge is not None:
            features = means(features, self.merge)
        if self.choice is not None:
            features = self.choice.blend(features)
        alive = torch.cat([mark.alive for mark in self.marks]) if self.flat is None else self.flat.alive
        if bool(alive.all()) if self.flat is None else sum(self.flat.counts) == len(alive):
            return features
        return where(on(alive, features.device)[:, None], features, torch.nan)

    def merged(self, features: Tensor) -> Tensor:
        """As `write`, with zeros instead of NaN: for features that are added to tokens and not looked at."""
        return self.write(features).nan_to_num(0.0)


def means(features: Tensor, into: Tensor) -> Tensor:
    """Features (F, C), those that several are merged into, as `into` (F,) says, with their mean."""
    target = into.to(features.device)
    total = torch.zeros(features.shape, dtype=torch.float32, device=features.device)
    total = total.index_add(0, target, features.float())
    ones = torch.ones(len(features), dtype=torch.float32, device=features.device)
    size = torch.zeros(len(features), dtype=torch.float32, device=features.device).index_add(0, target, ones)
    alone = (size <= 1)[:, None]
    return torch.where(alone, features, (total / size.clamp(min=1)[:, None]).to(features.dtype))


def must_remain(pruner: VisionStagePruner, plan: MediaPlan, run: EncoderRun) -> Tensor:
    """(items,) long, patches of each encoder item that merging must leave, so that each medium has its least features.

    Merging a window of w x w features takes w * w - 1 of them, and (w * pool) ** 2 - 1 patches.
    """
    assert run.grid is not None
    assert pruner.window is not None
    patches = run.grid[0] * run.grid[1]
    items = max(int(layout.patches.max()) for layout in plan.layouts if layout.size) // patches + 1
    remain = torch.zeros(items, dtype=torch.long, device=HOST)
    window, square = pruner.window**2 - 1, (pruner.window * run.pool) ** 2 - 1
    for layout, fewest in zip(plan.layouts, plan.least, strict=True):
        item, count = layout.items(patches)
        gone = max(0, layout.size - fewest)
        for i, n in zip(item, share_out(min(gone, sum(count)), count), strict=True):
            remain[i] = patches - n // window * square
    return remain


def decide(
    pruner: VisionStagePruner,
    run: EncoderRun,
    plan: MediaPlan,
    features: Tensor,
    chooser: VisionSelector | None = None,
    choice: PlacedSelections | None = None,
    weigh: Weigher | None = None,
) -> FeatureMarks:
    """Merge, select and protect.

    Args:
        pruner: the vision stage.
        run: what the encoder did.
        plan: what is asked of each medium.
        features: (F, C) of all media, one after the other.
        chooser: asks the pruner's rule, if it has one.
        choice: what the rule has decided already, as the features left the encoder.
        weigh: says what is important in place of the encoder's attention, or None.
    """
    layouts, ends, shown, gone = plan.layouts, plan.ends, plan.shown, plan.gone
    patches = torch.from_numpy(stacked(layouts))
    importance = _importance(pruner, run, patches) if weigh is None else weigh(features).to(HOST)
    behind = run.grid is None and pruner.window is not None and not run.merges_packed
    owner = merge_behind(pruner, plan, features) if behind else owners(run, patches)
    owner = named(owner, plan)
    starts = [0]
    for layout in layouts:
        starts.append(starts[-1] + layout.size)
    if chooser is not None:
        return _by_rule(pruner, chooser, choice, layouts, features, importance, owner if behind else None, owner)
    order = None
    if pruner.compat == "released" and run.merged is not None and run.merged.merge_into is not None:
        slots = run.merged.merge_into.flatten().to(HOST)
        order = torch.where(patches[:, 0] < 0, -1, slots[patches[:, 0].clamp(min=0)])
    marks: list[Marks | None] = [None] * len(layouts)
    for size in {layout.size for layout in layouts}:
        group = [i for i, layout in enumerate(layouts) if layout.size == size]
        part = _Group(
            structural=torch.stack([layouts[i].structural for i in group]),
            importance=torch.stack([importance[starts[i] : starts[i + 1]] for i in group]),
            owner=torch.stack([owner[starts[i] : starts[i + 1]] - starts[i] for i in group]),
            most=torch.tensor([plan.most[i] for i in group], dtype=torch.long, device=HOST),
            ends=_marked([layouts[i].size for i in group], {group.index(i): k for i, k in ends.items() if i in group}),
            shown=None if shown is None else torch.stack([shown[i] for i in group]),
            gone=None if gone is None else torch.stack([gone[starts[i] : starts[i + 1]] for i in group]),
        )
        for i, mark in zip(group, part.marks(pruner), strict=True):
            marks[i] = mark
            if order is not None:
                own = order[starts[i] : starts[i + 1]]
                front = int((own < 0).sum())
                marks[i] = replace(
                    mark, order=torch.where(own < 0, torch.arange(size, dtype=torch.long, device=HOST), own + front)
                )
    done = [mark for mark in marks if mark is not None]
    if not behind:
        return FeatureMarks(done, None)
    into = [mark.order + start for mark, start in zip(done, starts, strict=False)]
    return FeatureMarks(done, torch.cat(into) if into else None)


def _by_rule(
    pruner: VisionStagePruner,
    chooser: VisionSelector,
    choice: PlacedSelections | None,
    layouts: Sequence[Layout],
    features: Tensor,
    importance: Tensor,
    merge: Tensor | None,
    owner: Tensor,
) -> FeatureMarks:
    """Marks of what a rule chooses; the key set are the most important of what it keeps."""
    done = choice is not None
    if choice is None:
        choice = chooser(features if merge is None else means(features, merge), on(owner, features.device))
    assert choice.into is not None  # as the chooser makes it
    kept, became, ordered = choice.keep.to(HOST), choice.into.to(HOST), choice.order.to(HOST)
    marks, start = [], 0
    for layout in layouts:
        mine = slice(start, start + layout.size)
        keep, into = kept[mine], became[mine]
        picture = keep & ~layout.structural
        order = (
            ordered[mine] - start
            if pruner.compat == "released"
            else torch.arange(layout.size, dtype=torch.long, device=HOST)
        )
        marks.append(
            Marks(
                alive=keep,
                protected=pruner.protect(importance[None, mine], picture[None])[0],
                importance=importance[mine],
                order=order,
                assignment=torch.where(into < 0, -1, into - start),
            )
        )
        start += layout.size
    return FeatureMarks(marks, merge, None if done else choice)


@dataclass
class _Group:
    """Media with equally many features, (B, N) each."""

    structural: Tensor
    importance: Tensor
    owner: Tensor
    most: Tensor
    ends: Tensor
    shown: Tensor | None
    gone: Tensor | None = None

    def marks(self, pruner: VisionStagePruner) -> list[Marks]:
        """The decisions. `order` is the feature that names what each became part of, dropped or not."""
        importance, owner = self.importance, self.owner
        alive = owner == torch.arange(owner.shape[1], dtype=torch.long, device=owner.device)
        alive = alive if self.gone is None else alive & ~self.gone
        seen = alive if self.shown is None else alive & self.shown
        count = self.most if pruner.selects and bool((seen.sum(1) > self.most).any()) else None
        keep, protected = pruner.select(importance, alive if count is None else seen, count, self.structural, self.ends)
        assignment = owner.masked_fill(~keep.gather(1, owner), -1)
        rows = zip(keep, protected, importance, owner, assignment, strict=True)
        return [Marks(*row) for row in rows]


def _marked(sizes: Sequence[int], places: Mapping[int, int]) -> Tensor:
    """(B, N) bool, True at one place of some rows."""
    out = torch.zeros(len(sizes), max(sizes, default=0), dtype=torch.bool, device=HOST)
    for row, place in places.items():
        out[row, place] = True
    return out


def _importance(pruner: VisionStagePruner, run: EncoderRun, patches: Tensor) -> Tensor:
    """(F,) mean encoder attention of each feature's patches; 0 for structural rows."""
    if not pruner.needs_attention:
        return torch.zeros(len(patches), dtype=torch.float32, device=HOST)
    return of_features(run, pruner.importance, patches)


def merge_behind(pruner: VisionStagePruner, plan: MediaPlan, features: Tensor) -> Tensor:
    """(F,) long as `owners`, for windows over the cells of each grid of features.

    Windows with a feature that is gone do not merge.
    """
    gone = plan.gone
    owner = torch.arange(len(features), dtype=torch.long, device=HOST)
    start = 0
    for layout, fewest in zip(plan.layouts, plan.least, strict=True):
        cells = layout.cells
        place = torch.empty(layout.offsets[-1], dtype=torch.long, device=HOST)
        place[cells[cells >= 0]] = (cells >= 0).nonzero()[:, 0] + start  # cell -> feature
        sizes = [b - a for a, b in zip(layout.offsets[:-1], layout.offsets[1:], strict=True)]
        lost = 0 if gone is None else int(gone[start : start + layout.size].sum())
        free = share_out(min(max(0, layout.size - lost - fewest), sum(sizes)), sizes)
        for grid, first, size, n in zip(layout.grids, layout.offsets, sizes, free, strict=False):
            if not pruner.merges(grid):
                continue
            mine = place[first : first + size]
            limit = torch.tensor([size - n], dtype=torch.long, device=features.device) if pruner.selects else None
            similarity = pruner.similarity(
                features[mine][None].float(), grid, gone=None if gone is None else gone[mine]
            )
            merged = pruner.merge_by(similarity, grid, limit).to(HOST)
            if merged.merge_into is not None:
                owner[mine] = mine[merged.keep[0, merged.merge_into[0]]]
        start += layout.size
    return owner
