"""What becomes of each feature where every count is known beforehand: decided on the device, and nothing waits.

It decides what `mustdrop.runtime.vision.marks` decides, and asks rules as `mustdrop.runtime.vision.selection` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.budget import share_out
from mustdrop.constants import constant, count_up, every, numbers, sent
from mustdrop.layout import Layout
from mustdrop.pruners import VisionStagePruner
from mustdrop.runtime.records import FlatMarks, Marks
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.runtime.vision.feature_tables import of_features, owners, plain, stacked
from mustdrop.runtime.vision.fixed_counts import FeatureCounts, windows_behind
from mustdrop.runtime.vision.marks import FeatureMarks, means
from mustdrop.runtime.vision.media_plan import MediaPlan
from mustdrop.runtime.vision.selection import PlacedSelections, VisionSelector, Weigher


def decide(
    pruner: VisionStagePruner,
    run: EncoderRun,
    plan: MediaPlan,
    features: Tensor,
    counts: FeatureCounts,
    chooser: VisionSelector | None,
    choice: PlacedSelections | None,
    weigh: Weigher | None = None,
) -> FeatureMarks:
    """Merge, select and protect; see `mustdrop.runtime.vision.marks.decide`.

    Args:
        pruner: the vision stage.
        run: what the encoder did.
        plan: what is asked of each medium.
        features: (F, C) of all media, one after the other.
        counts: how many there are when it is done.
        chooser: asks the pruner's rule, if it has one.
        choice: what the rule has decided already, as the features left the encoder.
        weigh: says what is important in place of the encoder's attention, or None.
    """
    layouts, device = plan.layouts, features.device
    table = stacked(layouts)
    as_read = plain(table)
    patches = sent(table, device)
    importance = of_features(run, pruner.importance, patches, as_read) if pruner.needs_attention else None
    importance = importance if weigh is None else weigh(features)
    behind = run.grid is None and pruner.window is not None
    owner: Tensor | None = None  # None: nothing has merged
    # each medium is an item, and each feature a patch of it
    simple = run.names is not None and as_read and all(own.size == run.names[0].shape[1] for own in layouts)
    if behind:
        owner = _owners_behind(pruner, plan, features)
    elif simple and chooser is None:
        pass
    elif run.merged is not None:
        owner = owners(run, patches, as_read)
    local = False  # whether `order` counts from each medium's first feature
    if chooser is not None:
        if choice is None:
            seen = means(features, owner) if behind and owner is not None else features
            choice, written = choose(chooser, seen, owner, counts), False
        else:
            written = True
        keep, order = choice.keep, count_up(1, len(features), device)[0]
        into: Tensor | None = choice.into
    else:
        written = True
        names = run.names if simple else None
        keep = _selected(pruner, layouts, importance, owner, counts, device, None if names is None else names[1])
        order = count_up(1, len(features), device)[0] if owner is None else owner
        if names is not None:
            order, local = names[0].flatten(), True
        into = None
    protected = _protected(pruner, layouts, importance, keep, counts)
    zeros = constant(
        ("zeros", len(features)), device, lambda: torch.zeros(len(features), dtype=torch.float32, device=device)
    )
    nothing = _nothing(len(features), device)
    marks, start = [], 0
    for layout in layouts:
        mine = slice(start, start + layout.size)
        marks.append(
            Marks(
                keep[mine],
                (nothing if protected is None else protected)[mine],
                (zeros if importance is None else importance)[mine],
                order[mine],
                None if into is None else into[mine],
                0 if local else start,
            )
        )
        start += layout.size
    flat = FlatMarks(keep, protected, importance, counts.kept)
    return FeatureMarks(marks, owner if behind else None, None if written else choice, flat)


def _nothing(n: int, device: torch.device) -> Tensor:
    """(n,) bool, all False."""
    return constant(("none", n), device, lambda: torch.zeros(n, dtype=torch.bool, device=device))


def _owners_behind(pruner: VisionStagePruner, plan: MediaPlan, features: Tensor) -> Tensor | None:
    """(F,) long as `owners`, for windows over the cells of each grid of features; None if none merges."""
    device = features.device
    owner, start = count_up(1, len(features), device)[0], 0
    changed: Tensor | None = None
    for layout, fewest in zip(plan.layouts, plan.least, strict=True):
        cells = layout.cell_table
        place = np.zeros(layout.offsets[-1], dtype=np.int64)
        place[cells[cells >= 0]] = np.flatnonzero(cells >= 0) + start  # cell -> feature
        for grid, first, end, n in zip(
            layout.grids, layout.offsets[:-1], layout.offsets[1:], windows_behind(pruner, layout, fewest), strict=True
        ):
            if not n:
                continue
            mine = sent(place[first:end], device)
            _, names, _ = pruner.merge_most(pruner.similarity(features[mine][None].float(), grid), grid, [n])
            changed = owner.clone() if changed is None else changed
            changed = changed.scatter(0, mine, mine[names[0]])
        start += layout.size
    return changed


def _by_size(layouts: Sequence[Layout]) -> list[tuple[list[int], Sequence[int]]]:
    """Media with equally many features, and where the features of each begin."""
    starts = np.cumsum([0, *(layout.size for layout in layouts)]).tolist()
    sizes = sorted({layout.size for layout in layouts if layout.size})
    groups = [[i for i, layout in enumerate(layouts) if layout.size == size] for size in sizes]
    return [(group, [starts[i] for i in group]) for group in groups]


def _rows(x: Tensor, layouts: Sequence[Layout], group: list[int], starts: Sequence[int]) -> Tensor:
    """(b, N) values of media with equally many features, of (F,) of all."""
    size = layouts[group[0]].size
    if len(group) * size == len(x):
        return x.view(len(group), size)
    return torch.stack([x[start : start + size] for start in starts])


def _joined(parts: list[tuple[list[int], Tensor]], layouts: Sequence[Layout]) -> Tensor:
    """(F,) of all media, of (b, N) of each group."""
    if len(parts) == 1 and all(layout.size for layout in layouts):
        return parts[0][1].flatten()
    by_medium = {i: row for group, rows in parts for i, row in zip(group, rows, strict=True)}
    return torch.cat([by_medium[i] for i in range(len(layouts)) if i in by_medium])


def _structural(layouts: Sequence[Layout], group: list[int], device: torch.device) -> Tensor | None:
    """(b, N) bool, rows that stand for no part of a picture; None without any."""
    if all(layouts[i].in_picture == layouts[i].size for i in group):
        return None
    return sent(np.stack([layouts[i].gaps for i in group]), device)


def _selected(
    pruner: VisionStagePruner,
    layouts: Sequence[Layout],
    importance: Tensor | None,
    owner: Tensor | None,
    counts: FeatureCounts,
    device: torch.device,
    names: Tensor | None,
) -> Tensor:
    """(F,) bool, features that enter.

    `names` (media, N) says which of them name what they merged into, where each medium is an item of the encoder.
    """
    parts = []
    for group, starts in _by_size(layouts):
        size, kept = layouts[group[0]].size, [counts.kept[i] for i in group]
        everything = every((len(group), size), device)
        alive = everything if names is None else names[: len(group)]
        if owner is not None:
            begins = sent(np.array(starts, dtype=np.int64)[:, None], device)
            alive = _rows(owner, layouts, group, starts) - begins == count_up(len(group), size, device)
        if kept == [size] * len(group):
            parts.append((group, alive))
            continue
        score = everything.float() if importance is None else _rows(importance, layouts, group, starts)
        structural = _structural(layouts, group, device)
        order = None if structural is None else torch.zeros_like(score)
        stays = kernels.select(pruner.scores(score), alive, numbers(kept, device), 0, structural, order)[1]
        parts.append((group, stays))
    return _joined(parts, layouts)


def _protected(
    pruner: VisionStagePruner, layouts: Sequence[Layout], importance: Tensor | None, keep: Tensor, counts: FeatureCounts
) -> Tensor | None:
    """(F,) bool, the key set; None if it is empty."""
    if not pruner.key_share or importance is None:
        return None
    parts = []
    for group, starts in _by_size(layouts):
        picture = _rows(keep, layouts, group, starts)
        structural = _structural(layouts, group, keep.device)
        if structural is not None:
            picture = picture & ~structural
        protect = []
        for i in group:
            rows = layouts[i].size - layouts[i].in_picture  # they stay before all others
            protect.append(pruner.protected_count(max(0, counts.kept[i] - rows)))
        score = _rows(importance, layouts, group, starts)
        parts.append((group, kernels.select(score, picture, numbers(protect, keep.device), 0)[1]))
    return _joined(parts, layouts)


# -- by a rule --------------------------------------------------------------------------------------------------------


def choose(chooser: VisionSelector, features: Tensor, owner: Tensor | None, counts: FeatureCounts) -> PlacedSelections:
    """What a rule decides; see `VisionSelector`.

    Args:
        chooser: asks the rule.
        features: (F, C) of all media, of the space that the rule asks for.
        owner: (F,) long, the feature that names what each merged into before; None if nothing has merged.
        counts: how many features of each medium there are, and stay.
    """
    device, number = features.device, len(features)
    index_of = count_up(1, number, device)[0]
    choice = PlacedSelections(_nothing(number, device), None, index_of)
    size: Tensor | None = None
    if owner is not None:
        ones = constant(("ones", number), device, lambda: torch.ones(number, dtype=torch.float32, device=device))
        size = ones.new_zeros(number).scatter_add(0, owner, ones)
    for media, index, stay in _candidates(chooser, owner, counts, device):
        if stay == index.shape[1]:
            choice.keep = choice.keep.index_fill(0, index.flatten(), True)
        elif stay:
            as_it_is = index.numel() == number and owner is None
            chosen = chooser.ask(features, size, media, index, stay, as_it_is)
            if as_it_is:
                choice.keep = torch.zeros_like(index, dtype=torch.bool).scatter_(1, chosen.keep, True).flatten()
            else:
                choice.keep = choice.keep.index_fill(0, index.gather(1, chosen.keep).flatten(), True)
            choice.parts.append((index, chosen))
    if owner is not None or any(chosen.merge_into is not None for _, chosen in choice.parts):
        into = torch.where(choice.keep, index_of, -1)
        for index, chosen in choice.parts:
            if chosen.merge_into is not None:
                kept_of = index.gather(1, chosen.keep)
                own = torch.where(chosen.merge_into < 0, -1, kept_of.gather(1, chosen.merge_into.clamp(min=0)))
                into = into.scatter(0, index.flatten(), own.flatten())
        choice.into = into if owner is None else into[owner]
    return choice


def _candidates(
    chooser: VisionSelector, owner: Tensor | None, counts: FeatureCounts, device: torch.device
) -> Iterator[tuple[list[int], Tensor, int]]:
    """(media, features of each as a row, how many of each row stay), for what is chosen from together."""
    if owner is not None:
        yield from _after_merging(chooser, owner, counts, device)
        return
    groups: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
    start = 0
    for i, layout in enumerate(chooser.plan.layouts):
        mine, structural = np.arange(start, start + layout.size), layout.gaps
        start += layout.size
        first, free = mine[structural][: counts.kept[i]], mine[~structural]
        if len(first):
            groups.setdefault((len(first), len(first)), []).append((i, first))
        for part, stay in _views(chooser, layout, free, counts.kept[i] - len(first)):
            groups.setdefault((len(part), stay), []).append((i, part))
    for (_, stay), views in groups.items():
        yield [i for i, _ in views], sent(np.stack([part for _, part in views]), device), stay


def _after_merging(
    chooser: VisionSelector, owner: Tensor, counts: FeatureCounts, device: torch.device
) -> Iterator[tuple[list[int], Tensor, int]]:
    """As `_candidates`, of the features that name what they and others have become part of."""
    layouts = chooser.plan.layouts
    for group, starts in _by_size(layouts):
        begins = sent(np.array(starts, dtype=np.int64)[:, None], device)
        here = _rows(owner, layouts, group, starts) - begins == count_up(len(group), layouts[group[0]].size, device)
        for merged in sorted({counts.merged[i] for i in group}):
            rows = [k for k, i in enumerate(group) if counts.merged[i] == merged]
            some = here if len(rows) == len(group) else here[sent(np.array(rows), device)]
            index = kernels.select(some.float(), some, numbers([merged] * len(rows), device), merged)[0]
            index = index + (begins if len(rows) == len(group) else begins[sent(np.array(rows), device)])
            for stay in sorted({counts.kept[group[k]] for k in rows}):
                own = [j for j, k in enumerate(rows) if counts.kept[group[k]] == stay]
                media = [group[rows[j]] for j in own]
                yield media, index if len(own) == len(rows) else index[sent(np.array(own), device)], stay


def _views(chooser: VisionSelector, layout: Layout, free: np.ndarray, room: int) -> list[tuple[np.ndarray, int]]:
    """(features of the medium, how many stay) for what is chosen from alone."""
    if not len(free):
        return []
    room = min(room, len(free))
    if not chooser.rule.by_view:
        return [(free, room)]
    view = chooser.view_of(layout)[~layout.gaps]
    parts = [free[view == v] for v in np.unique(view)]
    return list(zip(parts, share_out(room, [len(part) for part in parts]), strict=True))
