"""The rows of a prompt whose counts are all known before its first layer runs: kept and cut on the device.

With a number for the budget, how many tokens enter the language model and how many each filter leaves follows from the
prompt's shape. Which ones is then decided where the attention is, with one `select` per choice, and nothing waits: the
host knows the shapes and asks for nothing else. Where the data decide how many stay (thresholds, the rank rule, the
released code), the host has to look, and `mustdrop.runtime.language.decoder_layers` goes its other way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mustdrop import kernels, kv
from mustdrop.constants import constant, count_up, numbers, sent
from mustdrop.indices import PAD, on
from mustdrop.kv.cut import Cut, cut_alike
from mustdrop.pruners import PrefillPruner, TextScorer
from mustdrop.runtime.records import FlatMarks
from mustdrop.runtime.state import Call

if TYPE_CHECKING:
    from mustdrop.runtime.language.vision_tokens import VisionTokens
    from mustdrop.runtime.session import Runtime


@dataclass(frozen=True)
class ScoringRows:
    """Which rows of a prompt score, counted from its end: nothing between them and the end ever leaves.

    Attributes:
        from_end: (B, R) tokens that are not padding from each scoring one on, itself included; PAD in front fills up.
        alike: whether they are the same rows one after the other in every prompt.
    """

    from_end: np.ndarray
    alike: bool

    @classmethod
    def of(cls, raters: np.ndarray, valid: np.ndarray) -> ScoringRows:
        """From (B, S) bool each: the rows that score, and what is not padding."""
        behind = valid[:, ::-1].cumsum(1)[:, ::-1]
        rows = [own[which] for own, which in zip(behind, raters, strict=True)]
        most = max((len(row) for row in rows), default=0)
        table = np.full((len(rows), most), PAD, dtype=np.int64)
        for b, row in enumerate(rows):
            table[b, most - len(row) :] = row
        alike = most > 0 and bool((table == np.arange(table[0, 0], table[0, 0] - most, -1)).all())
        return cls(table, alike)

    def rows(self, n: int, device: torch.device) -> Tensor:
        """(B, R) long, the scoring ones of n rows, PAD on padding."""
        batch, most = self.from_end.shape
        if self.alike:
            first = n - int(self.from_end[0, 0])
            return constant(
                ("scoring", batch, first, most),
                device,
                lambda: torch.arange(first, first + most, dtype=torch.long, device=device).repeat(batch, 1),
            )
        table = torch.from_numpy(np.where(self.from_end == PAD, PAD, n - self.from_end))
        return on(table, device)

    def visible(self, rows: Tensor, n: int) -> Tensor | None:
        """(B, R, n) bool, what the rows see of n rows in a causal pattern, if it follows from shapes alone."""
        if not self.alike:
            return None
        batch, most = self.from_end.shape
        first = n - int(self.from_end[0, 0])
        return constant(
            ("seen", batch, first, most, n),
            rows.device,
            lambda: torch.arange(n, dtype=torch.long, device=rows.device) <= rows[..., None],
        )

    def flags(self, n: int, device: torch.device) -> Tensor:
        """(B, n) bool, True at the scoring rows."""
        rows = self.rows(n, device)
        if self.alike:
            first, most = n - int(self.from_end[0, 0]), rows.shape[1]
            return constant(("flags", first, most, n), device, lambda: _between(n, first, most, device)).expand(
                len(rows), -1
            )
        out = torch.zeros(len(rows), n + 1, dtype=torch.bool, device=device)
        return out.scatter(1, rows.masked_fill(rows == PAD, n), True)[:, :n]


def _between(n: int, first: int, most: int, device: torch.device) -> Tensor:
    place = torch.arange(n, dtype=torch.long, device=device)
    return (place >= first) & (place < first + most)


@dataclass
class FixedRows:
    """Rows that are left of a prompt, on the device.

    Attributes:
        vision: (B, n) bool, which of them are vision tokens.
        alive: (B, n) bool, those of them that the vision stage has not dropped.
        protected: (B, n) bool, tokens that filters take last, or None.
        importance: (B, n) float32, orders these among themselves, or None.
        is_text: (B, n) bool, rows that are neither vision tokens nor padding, while all rows are there.
        text: per prompt, how many these are.
        left: per prompt, vision tokens that are there.
        scoring: the rows that score.
        padding: (B, S) bool, rows that are padding, while all rows are there; None without any.
        rows: (B, n) long, chunk index of each row, PAD on padding; None while all are there.
        entry: (B, M) long, the rows that the vision stage left; None where it has not been asked, or all are.
        cuts: decoder layers before which rows left, but for the first.
        inside: for each of these, (B, n) long, where the rows that are left were among those before the cut.
    """

    vision: Tensor
    alive: Tensor
    protected: Tensor | None
    importance: Tensor | None
    is_text: Tensor
    text: list[int]
    left: list[int]
    scoring: ScoringRows
    padding: Tensor | None = None
    rows: Tensor | None = None
    padded: bool = False
    entry: Tensor | None = None
    cuts: list[int] = field(default_factory=list)
    inside: list[Tensor] = field(default_factory=list)

    @classmethod
    def looked(cls, media: VisionTokens, device: torch.device) -> FixedRows:
        """The rows of media at which the host has looked, on `device`: it knows now how many of them are left."""
        vision, valid = media.vision.numpy(), media.valid.numpy()
        alive, raters = media.alive.numpy() & vision, media.raters.numpy()
        own, rest = [None if x is None else on(x, device) for x in (media.protected, media.importance)]
        is_text = valid & ~vision
        return cls(
            sent(vision, device),
            sent(alive, device),
            own,
            rest,
            sent(is_text, device),
            is_text.sum(1).tolist(),
            alive.sum(1).tolist(),
            ScoringRows.of(raters & valid, valid),
            sent(~valid, device) if media.padded else None,
        )

    @property
    def n(self) -> int:
        """Rows per prompt, padding included."""
        return self.vision.shape[1]

    def _besides(self, device: torch.device) -> dict[str, Any]:
        """What `kernels.select` is told, on `device`, of the rows of text, which stay."""
        if self.padding is not None:
            return {"others": on(self.is_text, device)}
        if self.rows is not None and self.padded:
            return {"others": on(~self.vision & (self.rows != PAD), device)}
        return {"rest": True}

    @property
    def positions(self) -> Tensor:
        """(B, n) long, logical position of each row, PAD on padding."""
        if self.rows is not None:
            return self.rows
        every = count_up(len(self.vision), self.n, self.vision.device)
        return every if self.padding is None else every.masked_fill(self.padding, PAD)

    def slots(self, wanted: list[int]) -> int:
        """Rows per prompt once `wanted` vision tokens are left of each."""
        return max(text + n for text, n in zip(self.text, wanted, strict=True))

    def arrive(self) -> Tensor:
        """Choose the rows that enter the first layer; (B, n) bool, which they are."""
        score = self.alive.float() if self.importance is None else self.importance
        count, slots = numbers(self.left, self.vision.device), self.slots(self.left)
        self.entry, stay = kernels.select(score, self.alive, count, slots, others=self.is_text)
        return stay

    def enter(self, hidden: Tensor) -> Tensor:
        """Only what the vision stage left enters the first layer; (B, M, C) of `hidden` (B, S, C)."""
        assert self.entry is not None
        return self.take(self.entry, self.left, 0, hidden)

    def select(self, score: Tensor, wanted: list[int], gamma: float = 1.0, alpha: float = 1.0) -> Tensor:
        """(B, M) long, the rows that stay: all text, and the best vision tokens, the protected ones first.

        Args:
            score: (B, n), or the statistics (B, 2, n) of what the text gives.
            wanted: per prompt, vision tokens that stay.
            gamma: see `mustdrop.kernels.select`.
            alpha: see `mustdrop.kernels.select`.
        """
        device = score.device  # of a later layer, where the rows may not have been yet
        vision, count, slots = on(self.vision, device), numbers(wanted, device), self.slots(wanted)
        protected, importance = (None if x is None else on(x, device) for x in (self.protected, self.importance))
        return kernels.select(
            score, vision, count, slots, protected, importance, gamma, alpha, **self._besides(device)
        )[0]

    def among(self, stays: Tensor, wanted: list[int]) -> Tensor:
        """(B, M) long, the rows that stay where a rule has chosen: `stays` (B, n) bool over the vision tokens."""
        device = stays.device
        vision, count, slots = on(self.vision, device), numbers(wanted, device), self.slots(wanted)
        return kernels.select(stays.float(), vision, count, slots, **self._besides(device))[0]

    def take(self, index: Tensor, wanted: list[int], layer: int, hidden: Tensor) -> Tensor:
        """Keep the rows `index` (B, M), PAD on padding, before decoder layer `layer`; returns their hidden states."""
        self.left = wanted
        self.padded = len({text + n for text, n in zip(self.text, wanted, strict=True)}) > 1
        device, rest = hidden.device, (self.protected, self.importance, self.rows)
        index = on(index, device)
        known = [on(x, device) for x in (self.vision, *rest, *self.inside) if x is not None]
        hidden, self.vision, *made = kernels.gather_rows([hidden, *known], index, zero=self.padded)
        left = iter(made)
        self.protected, self.importance, rows = (None if x is None else next(left) for x in rest)
        if layer:
            self.cuts.append(layer)
        places = [*left, *([index] if layer else [])]
        rows = index if rows is None else rows
        if self.padded:
            gone = index == PAD
            rows, places = rows.masked_fill(gone, PAD), [place.masked_fill(gone, PAD) for place in places]
        self.alive, self.rows, self.inside, self.padding, self.entry = self.vision, rows, places, None, None
        return hidden

    def evict(self, layers: list[kv.Slots], first: int) -> None:
        """Cut what is gone after the last layer from the caches of `layers`, the first of which is layer `first`.

        Each layer holds the rows that it processed.
        """
        assert self.rows is not None
        start = 0
        for cut, index in zip(self.cuts, self.inside, strict=True):
            if cut > first:
                some = layers[max(start, first) - first : cut - first]
                cut_alike(some, Cut(index, self.rows, self.vision, self.padded))
            start = cut


def possible(runtime: Runtime, call: Call | None, kinds: Tensor, ends: bool) -> bool:
    """Whether all counts of a pass are known beforehand.

    Args:
        runtime: of the patched model.
        call: of the pass.
        kinds: of its tokens.
        ends: whether a prompt ends with a vision token.
    """
    method = runtime.method
    if call is None or call.looked is None or call.looked.kinds is not kinds or call.shown_of or method.renumber:
        return False
    if method.decode is not None and (method.decode.reads_prompt or method.decode.old_pictures is not None):
        return False
    if method.marks and (call.unmarked or not call.marks or not set(call.flat) >= set(call.marks)):
        return False
    return method.prefill is None or counts_are_known(method.prefill, ends)


def counts_are_known(prefill: PrefillPruner, ends: bool) -> bool:
    """Whether it is known how many tokens each filter leaves once it is known how many enter, and which rows score.

    Args:
        prefill: the prefill stage.
        ends: whether a prompt ends with a vision token.
    """
    # which rows score may be the scorer's own decision, from the data
    own = prefill.score is not None and type(prefill.score).raters is not TextScorer.raters
    return not own and leaves_a_number(prefill, ends)


def leaves_a_number(prefill: PrefillPruner, ends: bool) -> bool:
    """As `counts_are_known`, once it is known which rows score."""
    if type(prefill).__call__ is not PrefillPruner.__call__ or prefill.recycle is not None:
        return False
    if prefill.keep is None and prefill.survivors is None:
        return False
    return prefill.score is None or not ends  # a rule of somebody's own may let go of what must stay


def entering(flat: FlatMarks, feature_of: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The marks of the vision stage at the tokens of a prompt, all (B, S).

    Args:
        flat: of all features, in order.
        feature_of: (B, S) long, the feature that each token stands for, -1 for others, on the device.

    Returns:
        (alive, protected, importance): bool, bool, float32; False where there is no vision token.
    """
    known = [on(x, feature_of.device)[None] for x in (flat.alive, flat.protected, flat.importance) if x is not None]
    made = iter(kernels.gather_rows(known, feature_of, zero=True))
    alive = next(made)
    protected = None if flat.protected is None else next(made)
    return alive, protected, None if flat.importance is None else next(made)
