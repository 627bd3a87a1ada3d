"""What a prompt's budget asks of each of its media, before an encoder looks at them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from mustdrop.budget import share_out
from mustdrop.layout import Layout
from mustdrop.runtime.plan import RowPlan

if TYPE_CHECKING:
    from mustdrop.runtime.state import Call

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class MediaPlan:
    """What is asked of the media of one pass through an encoder; sequences have one entry per medium.

    Attributes:
        layouts: how its features lie.
        least: features that merging must leave.
        most: features that may enter the language model.
        ends: medium -> its feature that ends a prompt, predicts what follows, and must stay.
        shown: (N,) bool, features that no mask hides and that the input stage lets in; None: all.
        gone: (F,) bool over all media, features whose patches the input stage does not let in; None: it lets all in.
        words: (T, C), embeddings of its prompt's words; None where nobody asks for them, or the call has none.
    """

    layouts: Sequence[Layout]
    least: Sequence[int]
    most: Sequence[int]
    ends: Mapping[int, int] = field(default_factory=dict)
    shown: Sequence[Tensor] | None = None
    gone: Tensor | None = None
    words: Sequence[Tensor] | None = None

    @property
    def by_shapes(self) -> bool:
        """Whether it follows from the shapes of the prompt: no feature that may enter depends on masks or pixels."""
        return not self.ends and self.shown is None


@dataclass(frozen=True, eq=False)
class EncodedMedia:
    """The media that one call of `get_*_features` encodes, and whose prompts they belong to.

    Attributes:
        kind: of media.
        layouts: one per medium, how its features lie.
        owners: one per medium, its prompt. Where they are not those of a call, each is a prompt of its own.
        prompts: how many there are.
        during: the call that they are encoded in, or None.
        fills: whether they fill the placeholders of that call.
    """

    kind: str
    layouts: Sequence[Layout]
    owners: Sequence[int]
    prompts: int
    during: Call | None
    fills: bool

    @classmethod
    def of(cls, kind: str, layouts: Sequence[Layout], call: Call | None) -> EncodedMedia:
        """Find out which prompts of a call (None: there is none) these media belong to."""
        totals = [] if call is None else call.totals_of.get(kind, [])
        owners = rows_of_media([layout.size for layout in layouts], totals)
        if owners is None:
            return cls(kind, layouts, range(len(layouts)), len(layouts), call, False)
        return cls(kind, layouts, owners, len(totals), call, call is not None)

    def by_prompt(self, values: Sequence[T]) -> list[list[T]]:
        """One list per prompt of what belongs to its media."""
        out: list[list[T]] = [[] for _ in range(self.prompts)]
        for value, row in zip(values, self.owners, strict=True):
            out[row].append(value)
        return out

    @property
    def call(self) -> Call | None:
        """The call whose placeholders they fill; None if they fill none."""
        return self.during if self.fills else None

    def ends(self, shown: Sequence[Tensor] | None) -> dict[int, int]:
        """See `ending_features`; media of no call end nothing."""
        return ending_features(self._shares, self.owners, self._sizes, shown)

    @functools.cached_property
    def shown(self) -> list[Tensor] | None:
        """Per medium (N,) bool, features that no mask hides; None: all."""
        return None if self.call is None else shown_features(self.call, self.kind, self._sizes)

    def plan(self, plan_of: Callable[[int], RowPlan], gone: Sequence[Tensor] | None) -> MediaPlan:
        """The part of each medium in its prompt's budget.

        Args:
            plan_of: the numbers of a prompt of so many vision tokens, for media of no call.
            gone: per medium (N,) bool, features whose patches the input stage does not let in; None without one.
        """
        call, shown = self.call, left(self.shown, gone)
        seen = self._sizes if shown is None else [int(own.sum()) for own in shown]
        plans = [plan_of(size) for size in self._sizes] if call is None else call.plans
        return MediaPlan(
            self.layouts,
            limits_of_media(seen, self.owners, self._shares, [plan.at_least for plan in plans]),
            limits_of_media(seen, self.owners, self._shares, [plan.at_most for plan in plans]),
            self.ends(shown),
            shown,
            None if gone is None else torch.cat(list(gone)),
            None if call is None or call.words is None else [call.words[row] for row in self.owners],
        )

    @functools.cached_property
    def _sizes(self) -> list[int]:
        return [layout.size for layout in self.layouts]

    @functools.cached_property
    def _shares(self) -> list[MediaShare]:
        if self.call is None:
            return [MediaShare((size,)) for size in self._sizes]
        return media_shares(self.call, self.kind)


def rows_of_media(sizes: Sequence[int], totals: Sequence[int]) -> list[int] | None:
    """Which prompt each medium belongs to: media fill the prompts' placeholders in order. None if they do not fit.

    Args:
        sizes: features per medium; empty ones (a row without an image) go with the row before.
        totals: placeholders per prompt.
    """
    rows, medium = [], 0
    for row, total in enumerate(totals):
        while medium < len(sizes) and (total > 0 or not sizes[medium]):
            rows.append(row)
            total -= sizes[medium]
            medium += 1
        if total:
            return None
    return rows if medium == len(sizes) else None


@dataclass(frozen=True)
class MediaShare:
    """How a prompt's tokens are split over kinds of media.

    Attributes:
        tokens: of the prompt, per kind of media.
        own: which of the kinds is being encoded.
        end: the kind whose token ends the prompt, or None.
    """

    tokens: Sequence[int]
    own: int = 0
    end: int | None = None

    @property
    def ends(self) -> bool:
        """Whether the kind that is being encoded ends the prompt."""
        return self.end == self.own


def media_shares(call: Call, kind: str) -> list[MediaShare]:
    """One per prompt."""
    names = list(call.totals_of)
    ends = [None if end is None else names.index(end) for end in call.open_ended]
    counts = [_seen(call, name) for name in names]
    return [MediaShare([count[row] for count in counts], names.index(kind), end) for row, end in enumerate(ends)]


def _seen(call: Call, kind: str) -> list[int]:
    """Tokens of one kind per prompt that no mask hides."""
    if kind not in call.shown_of:
        return call.totals_of[kind]
    return [int(row.sum()) for row in call.shown_of[kind]]


def shown_features(call: Call, kind: str, sizes: Sequence[int]) -> list[Tensor] | None:
    """Per medium (N,) bool, features that no mask hides; None: all."""
    if kind not in call.shown_of:
        return None
    return list(torch.split(torch.cat(call.shown_of[kind]), list(sizes)))


def ending_features(
    shares: Sequence[MediaShare], owners: Sequence[int], sizes: Sequence[int], shown: Sequence[Tensor] | None
) -> dict[int, int]:
    """Medium -> its feature that ends a prompt; that one predicts what follows."""
    found: dict[int, tuple[int, int]] = {}  # the last one of each prompt counts
    for i, row in enumerate(owners):
        if not shares[row].ends:
            continue
        seen = range(sizes[i]) if shown is None else shown[i].nonzero()[:, 0].tolist()
        if len(seen):
            found[row] = i, seen[-1]
    return dict(found.values())


def limits_of_media(
    sizes: Sequence[int], owners: Sequence[int], shares: Sequence[MediaShare], amounts: Sequence[int]
) -> list[int]:
    """Per medium, its part of its prompt's `amounts`: shared among the kinds of media first, then among the media.

    The parts of all kinds, each of which is worked out in a call of its own, add up. Where the tokens go round, each
    medium has one at least (an icon among large pictures); what ends the prompt has one in any case.
    """
    out = [0] * len(sizes)
    for row, amount in enumerate(amounts):
        media = [i for i, owner in enumerate(owners) if owner == row and sizes[i]]
        if media:
            share = shares[row]
            part = share_out(amount, share.tokens, share.end, each=True)[share.own]
            needs = len(media) - 1 if share.ends else None
            for i, n in zip(media, share_out(part, [sizes[i] for i in media], needs, each=True), strict=True):
                out[i] = n
    return out


def left(shown: Sequence[Tensor] | None, gone: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
    """Per medium (N,) bool, features that neither a mask hides nor the input stage took away; None: all."""
    if gone is None:
        return shown
    return [~lost if shown is None else seen & ~lost for lost, seen in zip(gone, shown or gone, strict=True)]
