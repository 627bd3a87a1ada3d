"""Run state: one `Call` per generate or forward and thread, one `Forward` per pass through the text model."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop.runtime.plan import RowPlan
from mustdrop.runtime.rows import PAD, take

if TYPE_CHECKING:
    from mustdrop.runtime.entry import Media


@dataclass
class ImageMarks:
    """What the vision stage decided for one image, all (N,) over its features in order.

    Attributes:
        alive: features that enter the language model.
        pinned: the key set.
        importance: encoder attention.
        order: place of an alive feature among those of its image.
        assignment: index of the alive feature that each feature became part of, -1 where it is gone.
        passed: tokens that each encoder layer processed, for the cost account.
        grid: (rows, columns, features before the patches).
    """

    alive: Tensor
    pinned: Tensor
    importance: Tensor
    order: Tensor
    assignment: Tensor
    passed: tuple[int, ...]
    grid: tuple[int, int, int]


@dataclass
class Prefill:
    """Record of the prompt's pass, for the trace. Rows are batch rows of that pass.

    Attributes:
        vision: (B, q) bool, vision tokens.
        start: logical tokens that the cache held before.
        rows: per decoder layer and once more for the end, (B, n) logical row indices inside the chunk (None = all
            of them).
        valid: (B, q) bool, tokens that are not padding.
        past: per decoder layer, entries that its cache held before.
        raters: text rows that scored (the most of any sample).
        scored: filter layers that scored.
        marks: per row, what the vision stage decided (empty without one).
    """

    vision: Tensor
    start: int
    valid: Tensor
    rows: list[Tensor | None] = field(default_factory=list)
    past: list[int] = field(default_factory=list)
    raters: int = 0
    scored: list[int] = field(default_factory=list)
    marks: list[list[ImageMarks]] = field(default_factory=list)


@dataclass
class Call:
    """One generate or one forward of the patched model.

    Attributes:
        owner: who began it and will end it.
        totals: vision tokens per prompt.
        length: tokens of the prompt that the cache does not hold yet; None in a plain forward, where all are.
        plans: numbers per prompt.
        open_ended: per prompt, whether it ends with a vision token: that token predicts the answer and must stay.
        marks: per prompt and image, what the vision stage decided (empty without one).
        grids: per prompt and image, (rows, columns, features before the patches).
        prefill: record of the first pass through the text model.
        labels: our copy of the labels.
        cache: the cache that the call used.
        steps: logical tokens that followed the first pass.
    """

    owner: object
    length: int | None = None
    totals: list[int] = field(default_factory=list)
    plans: list[RowPlan] = field(default_factory=list)
    open_ended: list[bool] = field(default_factory=list)
    marks: list[list[ImageMarks]] = field(default_factory=list)
    grids: list[list[tuple[int, int, int]]] = field(default_factory=list)
    prefill: Prefill | None = None
    labels: Tensor | None = None
    cache: Any = None
    steps: int = 0


@dataclass
class Forward:
    """One pass through the text model.

    Attributes:
        length: logical tokens of the chunk.
        start: logical tokens that the cache held before.
        batch: rows.
        cache: the adopted cache, or None.
        media: the vision tokens of this pass; None if it has none.
        rows: (B, n) long, chunk index of each current row, PAD on padding; None while all rows are there.
        padded: whether `rows` holds PAD.
        record: what the trace learns about this pass, None if it describes another one.
        attention: (B, T, n) captured at the last filter layer.
        memo: masks and positions shared by layers of one layout.
    """

    length: int
    start: int
    batch: int
    cache: Any = None
    media: Media | None = None
    rows: Tensor | None = None
    padded: bool = False
    record: Prefill | None = None
    attention: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    def index(self, device: torch.device) -> Tensor:
        """(B, n) chunk index of each current row."""
        if self.rows is not None:
            return self.rows
        return torch.arange(self.length, device=device).expand(self.batch, -1)

    def current(self, x: Tensor) -> Tensor:
        """(B, n) values of a (B, length) bool tensor at the current rows, False on padding."""
        return x if self.rows is None else take(x, self.rows, 1) & (self.rows != PAD)


class Local(threading.local):
    """State of one thread. Copying a model copies no state."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.forward: Forward | None = None
        self.vision: Tensor | None = None
        self.encoder: Any = None
        self.capture: object = None
        self.inside = False
        self.record: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Local:
        return Local()

    def __reduce__(self) -> Any:
        return Local, ()
