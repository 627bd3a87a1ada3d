"""A `VisionRule` at work in a model: which features it is shown, and what becomes of each afterwards.

Two types say what stays. A rule answers with a `Selection`, over the views that it was shown; the vision stage leaves
`Marks` of each medium (`mustdrop.runtime.records`), whoever decided. What lies between is no third answer: rules may be
asked about several views of different length, and `PlacedSelections` holds their selections with the features that each
is about, until marks are made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mustdrop.budget import share_out
from mustdrop.constants import host_table, sent
from mustdrop.layout import Layout
from mustdrop.pruners import Features, Importance, Selection, VisionRule
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.runtime.vision.feature_tables import named, of_features, places, plain, stacked
from mustdrop.runtime.vision.media_plan import MediaPlan


@dataclass
class PlacedSelections:
    """The selections that a rule made of the views of one call, at the F features that they are about.

    Attributes:
        keep: (F,) bool.
        into: (F,) long, the feature that each became part of, -1 where it is gone; None: each is its own, or gone.
        order: (F,) long, sort key of a kept feature, from the order in which the rule named what it kept.
        parts: features that were chosen from together, (B, N) long, and what was chosen.
    """

    keep: Tensor
    into: Tensor | None
    order: Tensor
    parts: list[tuple[Tensor, Selection]] = field(default_factory=list)

    def blend(self, features: Tensor) -> Tensor:
        """Features (F, C) with the rule's values in the rows that stay."""
        out = features
        for index, chosen in self.parts:
            if chosen.blend is None:
                continue
            if out is features:
                out = features.clone()
            index = index.to(features.device)
            made = chosen.blend(features[index].float())
            out[index.gather(1, chosen.keep.to(index.device)).flatten()] = made.flatten(0, 1).to(out)
        return out


@dataclass
class VisionSelector:
    """Asks a rule about the features of one call.

    Attributes:
        rule: the rule.
        run: what the encoder did.
        plan: what is asked of each medium.
        limited: whether the plan says how many features may stay; otherwise that is left to the rule.
        released: whether what merged in the encoder is shown in the encoder's order, as released codes have it.
        fixed: decides in place of this, where all counts are known beforehand.
    """

    rule: VisionRule
    run: EncoderRun
    plan: MediaPlan
    limited: bool = True
    released: bool = False
    fixed: Callable[[VisionSelector, Tensor, Tensor | None], PlacedSelections] | None = None

    def __call__(self, features: Tensor, owner: Tensor | None = None) -> PlacedSelections:
        """Choose from features (F, C) of all media.

        Args:
            features: of the space that the rule asks for.
            owner: (F,) long, the feature that names the window that each merged into before; None if none did.
        """
        if self.fixed is not None:
            return self.fixed(self, features, owner)
        device = features.device
        index = torch.arange(len(features), dtype=torch.long, device=device)
        owner = index if owner is None else named(owner, self.plan)
        into = torch.full_like(index, -1)
        choice = PlacedSelections(torch.zeros(len(features), dtype=torch.bool, device=device), into, index)
        choice.order = index.clone()
        size = None if torch.equal(owner, index) else torch.bincount(owner, minlength=len(owner)).float()
        groups: dict[tuple[int, int | None], list[tuple[int, Tensor]]] = {}
        start = 0
        for i, layout in enumerate(self.plan.layouts):
            mine = index[start : start + layout.size]
            free, room = self._room(i, layout, mine, owner, choice)
            for part, count in self._views(free - start, layout, room):
                groups.setdefault((len(part), count), []).append((i, part + start))
            start += layout.size
        for (n, count), views in groups.items():
            if count == 0:
                continue
            if count == n:
                for _, part in views:
                    choice.keep[part], into[part] = True, part
                continue
            for some in [views] if count is not None else [[view] for view in views]:
                self._choose(choice, features, size, some, count)
        # what had merged into a feature before goes where that one goes
        choice.into = into[owner]
        return choice

    def _room(
        self, i: int, layout: Layout, mine: Tensor, owner: Tensor, choice: PlacedSelections
    ) -> tuple[Tensor, int | None]:
        """Features that the rule may choose from, and how many of them; what must stay is kept right away.

        That is the feature that ends the prompt, then rows that stand for no part of the picture.
        """
        plan, alive = self.plan, owner[mine] == mine
        if plan.gone is not None:
            alive &= ~plan.gone[mine.to(plan.gone.device)].to(alive.device)
        most = plan.most[i] if self.limited else None
        if plan.shown is not None and most is not None:  # what is hidden takes no place from others
            seen = alive & plan.shown[i].to(mine.device)
            alive, most = (alive, int(alive.sum())) if most >= int(seen.sum()) else (seen, most)
        structural = layout.structural.to(mine.device)
        first = mine[structural & alive]
        if i in plan.ends:
            end = mine[plan.ends[i]]
            first = torch.cat([end[None], first[first != end]])
        first = first if most is None else first[:most]
        assert choice.into is not None  # as the caller has made it
        choice.keep[first], choice.into[first] = True, first
        free = mine[alive & ~structural & ~choice.keep[mine]]
        merged = self.run.merged
        if self.released and merged is not None and merged.merge_into is not None:
            slot = merged.merge_into.flatten().to(mine.device)[layout.patches[:, 0].to(mine.device)]
            free = free[slot[free - mine[0]].argsort()]
        return free, None if most is None else min(most - len(first), len(free))

    def _views(self, free: Tensor, layout: Layout, room: int | None) -> list[tuple[Tensor, int | None]]:
        """(features of the medium, how many stay) for what is chosen from alone."""
        if not len(free):
            return []
        if not self.rule.by_view:
            return [(free, room)]
        view = sent(self.view_of(layout), free.device)[free]
        parts = [free[view == v] for v in torch.unique(view).tolist()]
        if room is None:
            return [(part, None) for part in parts]
        return list(zip(parts, share_out(room, [len(part) for part in parts]), strict=True))

    def view_of(self, layout: Layout) -> np.ndarray:
        """(N,) long, the item of the encoder's batch that each feature comes from; of a packed one, the frame."""
        if self.run.item:
            item: np.ndarray = layout.patch_table[:, 0] // self.run.item
            return item
        frame: np.ndarray = places(layout)[0]
        return frame

    def _choose(
        self,
        choice: PlacedSelections,
        features: Tensor,
        size: Tensor | None,
        views: list[tuple[int, Tensor]],
        count: int | None,
    ) -> None:
        index = torch.stack([part for _, part in views])
        chosen = self.ask(features, size, [i for i, _ in views], index, count)
        kept = index.gather(1, chosen.keep)
        choice.keep[kept.flatten()] = True
        choice.order[kept.flatten()] = kept.sort(1).values.flatten()
        assert choice.into is not None  # as it is made here
        if chosen.merge_into is None:
            choice.into[kept.flatten()] = kept.flatten()
        else:
            choice.into[index] = torch.where(chosen.merge_into < 0, -1, kept.gather(1, chosen.merge_into.clamp(min=0)))
        choice.parts.append((index, chosen))

    def ask(
        self,
        features: Tensor,
        size: Tensor | None,
        media: list[int],
        index: Tensor,
        count: int | None,
        whole: bool = False,
    ) -> Selection:
        """The rule's choice from views of equal length.

        Args:
            features: (F, C) of all media.
            size: (F,) float, how many features each stands for; None: nothing has merged.
            media: the medium of each view.
            index: (b, N) long, the features of each view.
            count: how many of each stay; None leaves it to the rule.
            whole: whether the views are all features in their order.
        """
        return self.rule(shown_to(self.rule, self.run, self.plan, features, size, media, index, whole), count)


def shown_to(
    reader: VisionRule | Importance,
    run: EncoderRun,
    plan: MediaPlan,
    features: Tensor,
    size: Tensor | None,
    media: list[int],
    index: Tensor,
    whole: bool = False,
) -> Features:
    """What a rule or an importance sees of views of equal length.

    Args:
        reader: who reads.
        run: what the encoder did.
        plan: what is asked of each medium.
        features: (F, C) of all media.
        size: (F,) float, how many features each stands for; None: one.
        media: the medium of each view.
        index: (b, N) long, the features of each view.
        whole: whether the views are all features in their order.
    """

    def of_views(x: Tensor) -> Tensor:
        return x.view(*index.shape, *x.shape[1:]) if whole else x[index]

    table, known = np.concatenate([places(own) for own in plan.layouts], 1), host_table(index)
    if known is None:
        frame, row, column, first = (of_views(x) for x in sent(table, features.device))
    else:  # where features lie is known to the host, and stays so
        frame, row, column, first = (sent(x[known], features.device) for x in table)
    patches, words = stacked(plan.layouts), plan.words if reader.asks and plan.words else ()
    read = {one: of_features(run, one, sent(patches, features.device), plain(patches)) for one in reader.reads}
    return Features(
        of_views(features).float(),
        frame,
        row,
        column,
        {one: of_views(found) for one, found in read.items()},
        tuple(words[i].to(features.device) for i in media) if words else (),
        None if size is None else of_views(size),
        first,
    )


@dataclass
class Weigher:
    """Says how important the features of one call are, in place of the encoder's attention.

    Attributes:
        importance: who says.
        run: what the encoder did.
        plan: what is asked of each medium.
    """

    importance: Importance
    run: EncoderRun
    plan: MediaPlan

    def __call__(self, features: Tensor) -> Tensor:
        """(F,) float32 from 0 up, of features (F, C) of all media; 0 for structural rows."""
        layouts = self.plan.layouts
        starts = np.cumsum([0, *(layout.size for layout in layouts)])
        places = [np.flatnonzero(~layout.gaps) + start for layout, start in zip(layouts, starts[:-1], strict=True)]
        out = torch.zeros(len(features), dtype=torch.float32, device=features.device)
        size = torch.ones_like(out)
        for length in sorted({len(own) for own in places if len(own)}):
            media = [i for i, own in enumerate(places) if len(own) == length]
            index = sent(np.stack([places[i] for i in media]), features.device)
            seen = shown_to(self.importance, self.run, self.plan, features, size, media, index)
            out = out.index_copy(0, index.flatten(), self.importance.positive(seen).flatten().float())
        return out
