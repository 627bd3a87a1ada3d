"""The rows of a prompt whose counts are all known before its first layer runs: kept and cut on the device.

With a number for the budget, how many tokens enter the language model and how many each filter leaves follows from the
prompt's shape. Which ones is then decided where the attention is, with one `select` per choice, and nothing waits: the
host knows the shapes and asks for nothing else. Where the data decide how many stay (thresholds, the rank rule, the
released code), the host has to look, and `mustdrop.runtime.language.decoder_layers` goes its other way.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mustdrop import kernels, kv
from mustdrop.constants import constant, count_up, numbers, sent
from mustdrop.indices import PAD, on
from mustdrop.kv.cut import Cut, cut_alike
from mustdrop.pruners import PrefillPruner, TextScorer, answers
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
        places: (B, R) where they are while all rows are there, if padding follows a prompt; None: as `from_end` says.
    """

    from_end: np.ndarray
    alike: bool
    places: np.ndarray | None = None

    @classmethod
    def of(cls, raters: np.ndarray, valid: np.ndarray) -> ScoringRows:
        """From (B, S) bool each: the rows that score, and what is not padding."""
        behind = valid[:, ::-1].cumsum(1)[:, ::-1]
        most = int(raters.sum(1).max(initial=0))
        from_end, places = (np.full((len(raters), most), PAD, dtype=np.int64) for _ in range(2))
        for b, which in enumerate(raters):
            own = np.flatnonzero(which)
            places[b, most - len(own) :], from_end[b, most - len(own) :] = own, behind[b, own]
        alike = most > 0 and bool((from_end == np.arange(from_end[0, 0], from_end[0, 0] - most, -1)).all())
        follows = bool((places != _counted(from_end, valid.shape[1])).any())
        return cls(from_end, alike, places if follows else None)

    def rows(self, n: int, device: torch.device, whole: bool) -> Tensor:
        """(B, R) long, the scoring ones of n rows, PAD on padding; `whole`: all rows are there."""
        batch, most = self.from_end.shape
        if whole and self.places is not None:
            return on(torch.from_numpy(self.places), device)
        if self.alike:
            first = n - int(self.from_end[0, 0])
            return constant(
                ("scoring", batch, first, most),
                device,
                lambda: torch.arange(first, first + most, dtype=torch.long, device=device).repeat(batch, 1),
            )
        return on(torch.from_numpy(_counted(self.from_end, n)), device)

    def visible(self, n: int, device: torch.device, whole: bool) -> Tensor | None:
        """(B, R, n) bool, what they see of n rows in a causal pattern, if it follows from shapes alone."""
        if not self.alike or (whole and self.places is not None):
            return None
        batch, most = self.from_end.shape
        first = n - int(self.from_end[0, 0])
        rows = self.rows(n, device, whole)
        return constant(
            ("seen", batch, first, most, n),
            device,
            lambda: torch.arange(n, dtype=torch.long, device=device) <= rows[..., None],
        )

    def flags(self, n: int, device: torch.device, whole: bool, some: Tensor | None = None) -> Tensor:
        """(B, n) bool, True at the scoring rows, or at `some` of them, (B, R) bool."""
        rows = self.rows(n, device, whole)
        if some is not None:
            rows = rows.masked_fill(~some, PAD)
        elif self.alike and not (whole and self.places is not None):
            first, most = n - int(self.from_end[0, 0]), rows.shape[1]
            make = functools.partial(_between, n, first, most, device)
            return constant(("flags", first, most, n), device, make).expand(len(rows), -1)
        return flags_of(rows, n)


def flags_of(rows: Tensor, n: int) -> Tensor:
    """(B, n) bool, True at `rows` (B, R) long, PAD on padding."""
    out = torch.zeros(len(rows), n + 1, dtype=torch.bool, device=rows.device)
    return out.scatter(1, rows.masked_fill(rows == PAD, n), True)[:, :n]


def raters(scorer: TextScorer, embeds: Tensor, entering: Tensor, given: Tensor, places: Tensor) -> Tensor:
    """(B, R) bool, which of the scoring rows the scorer names.

    Args:
        scorer: of the prefill stage.
        embeds: (B, S, C), rows of NaN where the vision stage has dropped a feature.
        entering: (B, S) bool, vision tokens that enter.
        given: (B, S) bool, the scoring rows.
        places: (B, R) long, the same, PAD on padding.
    """
    named = answers.raters(scorer, embeds.nan_to_num(0.0), entering, given)
    return named.gather(1, places.clamp(min=0)) & (places != PAD)


def _counted(from_end: np.ndarray, n: int) -> np.ndarray:
    """(B, R) rows of n, counted from the end; PAD stays."""
    table: np.ndarray = np.where(from_end == PAD, PAD, n - from_end)
    return table


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
        raters: (B, R) bool, which of these do, where the scorer says so from the data; None: all.
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
    raters: Tensor | None = None

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

    def ask_raters(self, scorer: TextScorer, embeds: Tensor) -> None:
        """Let the scorer say which rows score; (B, S, C) embeddings, while all rows are there."""
        given = self.scoring.flags(self.n, embeds.device, True)
        places = self.scoring.rows(self.n, embeds.device, True)
        self.raters = raters(scorer, embeds, on(self.alive, embeds.device), given, places)

    def scorers(self, device: torch.device) -> Tensor:
        """(B, R) long, the rows that score among those that are left, PAD on padding."""
        rows = self.scoring.rows(self.n, device, self.rows is None)
        return rows if self.raters is None else rows.masked_fill(~on(self.raters, device), PAD)

    def scoring_flags(self, device: torch.device) -> Tensor:
        """(B, n) bool, True at these."""
        some = None if self.raters is None else on(self.raters, device)
        return self.scoring.flags(self.n, device, self.rows is None, some)

    def seen_by_scorers(self, device: torch.device) -> Tensor | None:
        """(B, R, n) bool, what these see in a causal pattern, if it follows from shapes alone."""
        return self.scoring.visible(self.n, device, self.rows is None)

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
    return method.prefill is None or leaves_a_number(method.prefill, ends)


def names_raters(prefill: PrefillPruner | None) -> TextScorer | None:
    """The scorer, where which rows score is its own decision, from the embeddings."""
    scorer = None if prefill is None else prefill.score
    return None if scorer is None or type(scorer).raters is TextScorer.raters else scorer


def leaves_a_number(prefill: PrefillPruner, ends: bool) -> bool:
    """Whether it is known how many tokens each filter leaves once it is known how many enter.

    Args:
        prefill: the prefill stage.
        ends: whether a prompt ends with a vision token.
    """
    if type(prefill).__call__ is not PrefillPruner.__call__:
        return False
    names = names_raters(prefill)
    if names is not None and names.rows != "text":
        return False  # the last of them is wanted, or none
    if prefill.keep is None and (prefill.survivors is None or prefill.recycle is not None):
        return False
    # a rule of somebody's own may let go of what must stay
    return not ends or (prefill.score is None and prefill.recycle is None)


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
