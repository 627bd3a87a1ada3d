"""What the prompt's pass leaves for the trace: its media, the marks of the vision stage, and what filters read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mustdrop.indices import Sent, on
from mustdrop.layout import Layout

if TYPE_CHECKING:
    from mustdrop.runtime.language.prompt_media import PromptMedia


_MANY = 1 << 20  # numbers that a trace may keep of what one filter read


@dataclass
class Marks:
    """What the vision stage decided, all (N,) over features in order: those of one medium, or of a whole prompt.

    Attributes:
        alive: features that enter the language model.
        protected: the key set.
        importance: encoder attention.
        order: sort key of an alive feature.
        assignment: index of the alive feature that each feature became part of, -1 where it is gone; None: that of its
            `order`, if it is alive.
        first: number of the first feature in `order` and `assignment`.
    """

    alive: Tensor
    protected: Tensor
    importance: Tensor
    order: Tensor
    assignment: Tensor | None
    first: int = 0

    def to(self, device: torch.device | str) -> Marks:
        """The same on another device, with an assignment, and numbers from 0 on."""
        alive, protected, importance, order = (
            x.to(device) for x in (self.alive, self.protected, self.importance, self.order)
        )
        order = order - self.first if self.first else order
        if self.assignment is None:
            return Marks(alive, protected, importance, order, order.masked_fill(~alive[order], -1))
        into = self.assignment.to(device)
        return Marks(
            alive, protected, importance, order, torch.where(into < 0, -1, into - self.first) if self.first else into
        )

    @property
    def into(self) -> Tensor:
        """`assignment`, as `to` has made it."""
        assert self.assignment is not None, "marks that were not moved to the host"
        return self.assignment

    @classmethod
    def of_prompt(cls, media: Sequence[Medium], marks: Sequence[Marks]) -> Marks:
        """Over the vision tokens of a prompt, on the host, from those of its media."""
        pairs = [(medium.index, mark.to("cpu")) for medium, mark in zip(media, marks, strict=True)]
        if len(pairs) == 1:  # its features are all the vision tokens of the prompt, in their order
            mark = pairs[0][1]
            return replace(mark, importance=mark.importance.float())
        n = sum(len(index) for index, _ in pairs)
        row = cls(
            alive=torch.ones(n, dtype=torch.bool, device="cpu"),
            protected=torch.zeros(n, dtype=torch.bool, device="cpu"),
            importance=torch.zeros(n, dtype=torch.float32, device="cpu"),
            order=torch.arange(n, dtype=torch.long, device="cpu"),
            assignment=torch.arange(n, dtype=torch.long, device="cpu"),
        )
        for index, mark in pairs:
            row.alive[index], row.protected[index] = mark.alive, mark.protected
            row.importance[index] = mark.importance.float()
            row.order[index] = index[mark.order]
            row.into[index] = torch.where(mark.into < 0, -1, index[mark.into.clamp(min=0)])
        return row


@dataclass(frozen=True)
class FlatMarks:
    """`Marks` before they are parted by medium: of all F features of one kind, one after the other, on the device.

    What the prefill reads of them there; the trace reads those of each medium.

    Attributes:
        alive: (F,) bool.
        protected: (F,) bool, or None where the key set is empty.
        importance: (F,) float32, or None where nothing reads it.
        counts: per medium, features that stay.
    """

    alive: Tensor
    protected: Tensor | None
    importance: Tensor | None
    counts: list[int]

    @classmethod
    def join(cls, parts: list[FlatMarks]) -> FlatMarks:
        """Those of several kinds."""
        if len(parts) == 1:
            return parts[0]
        device = parts[0].alive.device

        def together(name: str, fill: torch.dtype) -> Tensor | None:
            own = [getattr(part, name) for part in parts]
            if all(x is None for x in own):
                return None
            nothing = [torch.zeros(len(part.alive), dtype=fill, device=device) for part in parts]
            return torch.cat([zero if x is None else on(x, device) for x, zero in zip(own, nothing, strict=True)])

        alive = torch.cat([on(part.alive, device) for part in parts])
        counts = [n for part in parts for n in part.counts]
        return cls(alive, together("protected", torch.bool), together("importance", torch.float32), counts)


@dataclass(frozen=True, eq=False)
class Medium:
    """One image or video of a prompt.

    Attributes:
        kind: "image" or "video".
        layout: how its features lie.
        place: (N,) place of each feature among the vision tokens of the prompt.
    """

    kind: str
    layout: Layout
    place: np.ndarray

    @functools.cached_property
    def index(self) -> Tensor:
        """(N,) long, `place`."""
        return torch.from_numpy(self.place)


@dataclass(frozen=True, eq=False)
class FilterAttention:
    """Attention that a filter read, kept as it came: see `Prefill.hear`."""

    layer: int
    attention: Tensor | Sent
    rows: Tensor | None

    def of(self, vision: Tensor, sample: int) -> Tensor:
        """(N,) float, the sum over the words for each vision token of a prompt; NaN where it did not come that far.

        Args:
            vision: (B, q) bool, the vision tokens of the chunk.
            sample: the prompt.
        """
        if isinstance(self.attention, Sent):
            given = self.attention.received()[sample, 0].float()
        else:
            given = self.attention[sample].sum(0).float().cpu()
        seen = vision[sample].cpu()
        if self.rows is None:
            return given[seen]
        logical = torch.full((len(seen) + 1,), torch.nan, dtype=torch.float32, device="cpu")
        logical[self.rows[sample].cpu()] = given  # PAD is -1: one place too many, cut off
        return logical[:-1][seen]

    def __getstate__(self) -> dict[str, Any]:
        """Without the event of a device, which no other process has."""
        sent = isinstance(self.attention, Sent)
        return {**vars(self), "attention": Sent(self.attention.received()) if sent else self.attention}  # type: ignore[union-attr]


@dataclass
class Prefill:
    """Record of the prompt's pass, for the trace. Rows are batch rows of that pass.

    Attributes:
        vision: (B, q) bool, vision tokens, those that the attention mask hides too.
        start: logical tokens that the cache held before.
        rows: per decoder layer and once more for the end, (B, n) logical row indices inside the chunk (None = all
            of them).
        valid: (B, q) bool, tokens that the attention mask does not hide.
        past: per decoder layer, entries that its cache held before.
        scored: (decoder layer, rows whose attention was read there: the most of any sample), once per reader.
        heard: what each filter read.
        own: per row, what the vision stage decided over its vision tokens, where the host looked at that.
        shown: the media of each row, None without any.
    """

    vision: Tensor
    start: int
    valid: Tensor
    rows: list[Tensor | None] = field(default_factory=list)
    past: list[int] = field(default_factory=list)
    scored: list[tuple[int, int]] = field(default_factory=list)
    heard: list[FilterAttention] = field(default_factory=list)
    own: list[Marks] = field(default_factory=list)
    shown: PromptMedia | None = None

    @property
    def media(self) -> list[list[Medium]]:
        """Per row, its media in the order of the prompt; empty if the encoder did not run."""
        return [] if self.shown is None else self.shown.media

    def of_prompts(self) -> list[Marks]:
        """Per row, what the vision stage decided over its vision tokens, on the host; empty without one."""
        if self.own:
            return [mark.to("cpu") for mark in self.own]
        return [] if self.shown is None else self.shown.spread()

    def hear(self, layer: int, attention: Tensor | Sent, rows: Tensor | None) -> None:
        """Keep for the trace what a filter read, as it is: nothing is computed before somebody asks for it.

        Args:
            layer: decoder layer.
            attention: (B, R, n) of the rows that score, or (B, 2, n), their sum and maximum on the way to the host.
            rows: (B, n) chunk index of each token, None if all are there.
        """
        if isinstance(attention, Tensor):
            if attention.requires_grad:
                attention = attention.detach()
            if attention.numel() > _MANY:  # a trace is small
                attention = attention.sum(1, keepdim=True)
        self.heard.append(FilterAttention(layer, attention, rows))
