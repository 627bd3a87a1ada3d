"""A prompt's pass through the language model as tensors and numbers alone: it can be compiled, captured and replayed.

Where all counts are known beforehand, what follows from shapes is worked out before the first layer
(`mustdrop.runtime.language.straight_plan`), and what is only noted, in cache layers and for the trace, is noted after
the last one (`mustdrop.runtime.language.straight_record`). In between, the hooks read and write the attributes of one
`Straight` and nothing else: no wait, no cache of tables, no identity of an object. The results are those of
`mustdrop.runtime.language.fixed_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from mustdrop import kernels
from mustdrop.errors import MustDropError
from mustdrop.indices import PAD
from mustdrop.kv.cut import AT_ONCE
from mustdrop.pruners import PrefillPruner, Seen
from mustdrop.pruners.prefill import needs_rows
from mustdrop.pruners.recycling import Group
from mustdrop.runtime.language.attention_call import AttentionCall
from mustdrop.runtime.language.filter_step import clustered
from mustdrop.runtime.language.fixed_rows import FixedRows, flags_of, names_raters, raters
from mustdrop.runtime.language.layer_arguments import position_axes
from mustdrop.runtime.masks import RowMap, physical_mask
from mustdrop.runtime.masks_flex import Mask

_FACTS = (
    "length", "depth", "full", "before", "reads", "vision", "alive", "protected", "importance", "others", "padding",
    "given", "places",
)  # fmt: skip
_NOBODY = ("", -1)  # whose attention is read next, where nobody's is


@dataclass(frozen=True, eq=False)
class FilterPlan:
    """Rows leave, and how many is known.

    Attributes:
        layer: decoder layer before which they leave.
        count: (B,) long, vision tokens that stay.
        most: the most of them that stay in any prompt.
        slots: rows of each prompt that stay, padding included.
        ragged: whether prompts kept different numbers of rows before.
        padded: whether they do now.
        rows: (B, R) long, rows whose attention is read in the layer before, PAD on padding; None: it is not read.
        visible: (B, R, n) bool, what these see where no mask says it, if that follows from shapes.
        text: (B, n) bool, the text rows that score; None where nobody asks.
        kept: (B,) long, tokens that stay as they are, where clusters of others stay too; None: no clusters.
        groups: what is recycled (see `mustdrop.pruners.recycling.groups`).
    """

    layer: int
    count: Tensor
    most: int
    slots: int
    ragged: bool
    padded: bool
    rows: Tensor | None = None
    visible: Tensor | None = None
    text: Tensor | None = None
    kept: Tensor | None = None
    groups: tuple[Group, ...] = ()


@dataclass(eq=False)
class Straight:
    """The pass of one prompt: facts, tables, and what becomes of the rows on the way.

    Attributes:
        runtime: of the patched model.
        fixed: the rows as they were before the first layer.
        length: logical tokens.
        depth: decoder layers.
        full: the first layer whose cache is cut to what the last layer processed; `depth` where none is.
        choices: in the order of their layers.
        before: per decoder layer, the choice before it, or -1.
        reads: per decoder layer, the choice that reads its attention, or -1.
        functions: attention functions of the layers that are read.
        vision: (B, n) bool, which of the current rows are vision tokens.
        alive: (B, S) bool, those of all tokens that the vision stage left; None where it left all.
        protected: see `FixedRows`.
        importance: see `FixedRows`.
        others: (B, S) bool, tokens that are neither vision tokens nor padding.
        padding: (B, S) bool, padding; None without any.
        given: (B, S) bool, the text among which the scorer names what scores; None where all of it does.
        places: (B, R) long, the same as rows, PAD on padding.
        rows: (B, n) long, chunk index of each row, PAD on padding; None while all are there.
        inside: per cut of the caches, where the rows that are left were among those before it.
        history: per choice, the rows and the vision tokens among them afterwards, and the attention that was read.
        wanted: what `local.capture` would hold: whose attention is read next.
        entry: (B, M) long, the rows that enter the first layer, once they are chosen.
        attention: what was read for the next choice.
        keys: what was read of the keys for it, where the scorer reads them.
        raters: (B, R) bool, which of `places` score; None: all.
        layout: of the rows that are left; None while all are there.
        inner: the cache of the pass; None without one.
        left: whether the pass has ended.
        memo: arguments of layers, and what was made of them for the rows that are left.
    """

    runtime: Any
    fixed: FixedRows
    length: int
    depth: int
    full: int
    choices: list[FilterPlan]
    before: list[int]
    reads: list[int]
    functions: dict[int, Any]
    vision: Tensor
    alive: Tensor | None
    protected: Tensor | None
    importance: Tensor | None
    others: Tensor
    padding: Tensor | None
    given: Tensor | None = None
    places: Tensor | None = None
    rows: Tensor | None = None
    inside: list[Tensor] = field(default_factory=list)
    history: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    wanted: tuple[str, int] = _NOBODY
    entry: Tensor | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    raters: Tensor | None = None
    layout: RowMap | None = None
    inner: Any = None
    left: bool = False
    memo: list[tuple[str, Any, Any]] = field(default_factory=list)

    def facts(self) -> list[Any]:
        """All that the pass depends on, in tensors, numbers and None, besides the functions of its layers."""
        choices = [[getattr(choice, part.name) for part in fields(FilterPlan)] for choice in self.choices]
        own = [getattr(self, name) for name in _FACTS]
        return [*own, choices]

    def like(self, facts: list[Any]) -> Straight:
        """A pass of the same form that has not begun."""
        *own, choices = facts
        given = {**dict(zip(_FACTS, own, strict=True)), "choices": [FilterPlan(*choice) for choice in choices]}
        return Straight(self.runtime, self.fixed, functions=self.functions, **given)

    def columns(self, mask: Any) -> Any:
        """A mask over the tokens of the prompt alone: one for a static cache has columns for tokens to come."""
        if isinstance(mask, dict):
            return {name: self.columns(own) for name, own in mask.items()}
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[3] > self.length:
            return mask[..., : self.length]
        return mask

    # -- on the way ---------------------------------------------------------------------------------------------------

    def arrive(self, embeds: Tensor) -> Tensor:
        """Choose the rows that enter the first layer; (B, S, C) embeddings without the marks of those that do not."""
        scorer = names_raters(self.runtime.method.prefill)
        if scorer is not None and self.given is not None and self.places is not None:
            entering = self.vision if self.alive is None else self.alive
            self.raters = raters(scorer, embeds, entering, self.given, self.places)
        if self.alive is None:
            return embeds
        choice = self.choices[0]
        score = self.alive.float() if self.importance is None else self.importance
        self.entry, stay = kernels.select(score, self.alive, choice.count, choice.slots, others=self.others)
        return embeds.masked_fill(~stay[..., None], 0.0)

    def before_layer(self, i: int, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Drop rows if it is this layer's turn, then bring its arguments in line with the rows that are left."""
        if self.before[i] >= 0:
            hidden = self._drop(self.choices[self.before[i]], hidden)
        self.wanted = ("text", i) if self.reads[i] >= 0 else _NOBODY
        if self.layout is not None:
            kwargs = self._arguments(i, self.layout, hidden, kwargs)
        return (hidden,), kwargs

    def reads_now(self) -> int:
        """The decoder layer whose attention is being read; nobody's is then."""
        i, self.wanted = self.wanted[1], _NOBODY
        return i

    def read(self, i: int, module: nn.Module, q: Tensor, k: Tensor, mask: Mask, kwargs: dict[str, Any]) -> None:
        """Attention of the rows that score in decoder layer `i`."""
        choice, prefill = self.choices[self.reads[i]], self.runtime.method.prefill
        assert choice.rows is not None, "a layer that is not read"
        scaling = kwargs.get("scaling") or getattr(module, "scaling", None) or q.shape[-1] ** -0.5
        seen = choice.visible if mask is None else None  # a mask may hide more: a window, or what the caller's own says
        asked = AttentionCall(q, k, mask, scaling, kwargs.get("softcap"), seen=seen)
        given = asked.arguments(self._scorers(choice.rows))
        self.attention = kernels.row_probabilities(*given) if needs_rows(prefill) else kernels.text_statistics(*given)
        if prefill.score is not None and "keys" in prefill.score.reads:
            self.keys = k.transpose(1, 2).flatten(2).float()

    def _scorers(self, rows: Tensor) -> Tensor:
        """Of the rows that may score, (B, R), those that do; PAD elsewhere."""
        return rows if self.raters is None else rows.masked_fill(~self.raters, PAD)

    def add(self, hidden: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """What a text model adds to its vision tokens between layers (see `mustdrop.runtime.language.deepstack`)."""
        ordinal = (mask.flatten().cumsum(0) - 1).view(mask.shape)
        if self.rows is not None:
            place = self.rows.clamp(min=0)
            mask, ordinal = mask.gather(1, place) & (self.rows != PAD), ordinal.gather(1, place)
        added = rows[ordinal.clamp(min=0)]
        return hidden + added.masked_fill(~mask[..., None], 0.0)

    def leave(self, hidden: Tensor) -> Tensor:
        """(B, S, C) hidden states at the logical length; the caches of earlier layers keep what the last one saw."""
        self.memo, self.wanted, self.left = [], _NOBODY, True
        if self.rows is None:
            return hidden
        if self.inner is not None:
            self._cut(self.inner.layers)
        spare = int(self.choices[-1].padded)
        target = self.rows.masked_fill(self.rows == PAD, self.length) if spare else self.rows
        full = hidden.new_zeros(hidden.shape[0], self.length + spare, hidden.shape[2])
        return full.scatter(1, target[..., None].expand_as(hidden), hidden)[:, : self.length]

    def _drop(self, choice: FilterPlan, hidden: Tensor) -> Tensor:
        if choice.layer == 0:
            assert self.entry is not None, "embeddings that have not arrived"
            index, attention = self.entry, None
        else:
            index, hidden = self._chosen(choice, hidden)
            attention = self.attention
        self.entry = self.attention = self.keys = None
        rest = [self.protected, self.importance, self.rows]
        known = [x for x in rest if x is not None]
        hidden, self.vision, *made = kernels.gather_rows(
            [hidden, self.vision, *known, *self.inside], index, zero=choice.padded
        )
        left = iter(made)
        protected, importance, rows = [None if x is None else next(left) for x in rest]
        rows = index if rows is None else rows
        places = made[len(known) :] + ([index] if choice.layer else [])
        if choice.padded:
            gone = index == PAD
            rows, places = rows.masked_fill(gone, PAD), [place.masked_fill(gone, PAD) for place in places]
        self.protected, self.importance, self.rows, self.inside = protected, importance, rows, places
        self.history.append((rows, self.vision, attention))
        self.layout, self.memo = RowMap(rows, rows, rows, choice.padded, self.length), []
        return hidden

    def _chosen(self, choice: FilterPlan, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M) long, the rows that stay, by what the layer before has given; `hidden`, with its clusters as means."""
        prefill: PrefillPruner = self.runtime.method.prefill
        if self.attention is None:
            raise MustDropError(
                f"decoder layer {choice.layer - 1} ran without its attention being read: its attention module does "
                "not ask its config which function to use."
            )
        if not needs_rows(prefill):
            weights = prefill.global_threshold or 1.0, prefill.individual_threshold or 1.0
            return self._best(self.attention, choice, self.protected, self.importance, *weights), hidden
        features = None
        if prefill.score is not None and "hidden" in prefill.score.reads:
            norm = getattr(self.runtime.text, "norm", None)
            features = (hidden if norm is None else norm(hidden)).detach().float()
        elif prefill.recycle is not None:
            features = hidden.detach()
        text = choice.text
        if text is not None and self.raters is not None and choice.rows is not None:
            text = flags_of(self._scorers(choice.rows), text.shape[1])
        seen = Seen(self.attention, self.vision, text, self.keys, features, choice.most)
        first = {"protected": self.protected, "importance": self.importance}
        if choice.kept is None:
            stays = prefill.stays(seen, choice.count, **first)
        else:
            stays, into = prefill.joined(seen, choice.kept, choice.groups, **first)
            hidden = clustered(into, hidden)
        return self._best(stays.float(), choice, None, None), hidden

    def _best(
        self,
        score: Tensor,
        choice: FilterPlan,
        protected: Tensor | None,
        importance: Tensor | None,
        gamma: float = 1.0,
        alpha: float = 1.0,
    ) -> Tensor:
        others: Tensor | None = None
        if choice.ragged:
            others = self.others if self.rows is None else ~self.vision & (self.rows != PAD)
        return kernels.select(
            score, self.vision, choice.count, choice.slots, protected, importance, gamma, alpha, others, others is None
        )[0]

    def _arguments(self, i: int, layout: RowMap, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of decoder layer `i` for the rows that are left; layers that are given the same share it."""
        made = {**kwargs, "attention_mask": self._mask(i, layout, hidden, kwargs.get("attention_mask"))}
        for name, value in kwargs.items():
            axes = position_axes(self.runtime, name, value, self.length)
            if name == "position_ids" and self.runtime.flash:
                made[name] = None
            elif axes is not None:
                known = self._known("rows", value)
                made[name] = self._note("rows", value, _cut(value, axes, layout.rows)) if known is None else known
        return made

    def _mask(self, i: int, layout: RowMap, hidden: Tensor, mask: Any) -> Any:
        if i in self.runtime.recurrent:
            return layout.rows != PAD if layout.padded else None
        if mask is None and not layout.padded and self.runtime.implementation == "sdpa":
            return None
        known = self._known("mask", mask)
        if known is not None:
            return known
        return self._note("mask", mask, physical_mask(mask, layout, self.runtime.implementation, hidden))

    def _known(self, what: str, value: Any) -> Any:
        for kind, given, made in self.memo:
            if kind == what and _is(given, value):
                return made
        return None

    def _note(self, what: str, value: Any, made: Any) -> Any:
        self.memo.append((what, value, made))
        return made

    def _cut(self, layers: list[Any]) -> None:
        """Cut the caches of `layers`, each of which holds the rows that it processed, to those that are left."""
        start, cuts = 0, [choice.layer for choice in self.choices if choice.layer]
        for end, index in zip(cuts, self.inside, strict=True):
            some = [layer for layer in layers[max(start, self.full) : max(end, self.full)] if layer.keys is not None]
            start = end
            while some:
                few = max(1, AT_ONCE // max(1, 2 * some[0].keys.numel() * some[0].keys.element_size()))
                part, some = some[:few], some[few:]
                stored = kernels.compact([x for layer in part for x in (layer.keys, layer.values)], index)
                for layer, keys, values in zip(part, stored[::2], stored[1::2], strict=True):
                    layer.keys, layer.values = keys, values


def _is(a: Any, b: Any) -> bool:
    """Whether two arguments are one: a tensor, or as many of them."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b


def _cut(value: Any, axes: int, rows: Tensor) -> Any:
    """The rows of a table (B or 1, S, ...) or of several; with `axes` dimensions it has axes of positions in front."""
    tables = value if isinstance(value, tuple) else (value,)
    flat = [part for table in tables for part in (table.unbind(0) if table.ndim == axes else (table,))]
    made = iter(kernels.gather_rows(flat, rows))
    out = [
        torch.stack([next(made) for _ in range(table.shape[0])]) if table.ndim == axes else next(made)
        for table in tables
    ]
    return tuple(out) if isinstance(value, tuple) else out[0]
