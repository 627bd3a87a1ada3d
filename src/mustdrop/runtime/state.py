"""Run state: one `Call` per generate or forward and thread, one `Forward` per pass through the text model.

A call may begin inside another one, from a logits processor or from a forward hook: then the state of the outer call is
put aside, all of it, and comes back when the inner one ends.

What it says about tokens lies on the host (see `mustdrop.indices`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mustdrop.indices import PAD, Sent, on, take
from mustdrop.kernels.dispatch import current_log, fresh_log, log_to
from mustdrop.layout import Layout
from mustdrop.runtime.plan import RowPlan
from mustdrop.runtime.records import FlatMarks, Marks, Prefill

if TYPE_CHECKING:
    from types import FrameType

    from mustdrop.runtime.language.cache_policy import LayerReading
    from mustdrop.runtime.language.later_tokens import LaterTokens
    from mustdrop.runtime.language.straight_pass import Straight
    from mustdrop.runtime.language.vision_tokens import VisionTokens
    from mustdrop.runtime.vision.encoder_run import EncoderRun


@dataclass(frozen=True, eq=False)
class PromptOnHost:
    """What the host has seen of a prompt: ids and mask came over once, at the start of the call.

    Attributes:
        ids: (B, S) that were looked at, or a copy that is known to be one.
        mask: (B, S) that was looked at, or what is made of it; None without one.
        kinds: (B, S) long, index of the modality that each position stands for, -1 for text. On the host.
        valid: (B, S) bool, tokens that the mask does not hide. On the host.
        whole: whether it hides none: then no mask says the same, and `generate` leaves it out.
        tables: `kinds` and `valid`, for arithmetic without torch.
    """

    ids: Tensor
    mask: Any
    kinds: Tensor
    valid: Tensor
    whole: bool
    tables: tuple[np.ndarray, np.ndarray]

    def knows(self, ids: Tensor | None, mask: Any) -> bool:
        """Whether the host has seen both."""
        return ids is self.ids and (mask is self.mask if mask is not None else self.whole)


@dataclass
class Call:
    """One generate or one forward of the patched model.

    Attributes:
        generates: whether it is a `generate`, which passes through the model as often as it likes.
        loose: see `mustdrop.runtime.calls.Calls`.
        began: when, on the clock of the traces.
        prepared: arguments that `generate` has prepared for its next pass through the model.
        totals: vision tokens per prompt that the attention mask does not hide.
        totals_of: kind of media -> its tokens per prompt, hidden ones too: each stands for a feature.
        shown_of: kind of media -> per prompt (N,) bool, those that the mask does not hide; empty if it hides none.
        length: tokens of the prompt that the cache does not hold yet; None in a plain forward, where all are.
        plans: numbers per prompt.
        looked: what the host has seen of the prompt, if its ids and its mask are given.
        unmarked: whether some features bear no marks, because the model adds them later.
        open_ended: per prompt, the kind of media whose token it ends with, or None: that token predicts the answer and
            must stay.
        words: per prompt (T, C), embeddings of its words after the last vision token (all of them, if none follow);
            None where no rule asks for them.
        marks: kind of media -> per prompt and medium, what the vision stage decided (empty without one).
        flat: kind of media -> what it decided about all features, where the counts were known beforehand.
        layouts: kind of media -> per prompt and medium, how its features lie.
        encoded: what each pass through an encoder saw.
        prefill: record of the first pass through the text model.
        media: arguments that hold media: of the call, and then of its first pass.
        labels: our copies of `labels` and of `shift_labels`, which say at each token what it predicts.
        cache: the cache that the call used.
        steps: logical tokens that followed the first pass.
        kernels: which implementations ran (see `mustdrop.kernels`).
        whole: whether the mask of a `generate` of transformers' own hid nothing in its first pass; then none of its
            masks does.
        shows_all: whether that goes for the pass that runs.
    """

    generates: bool = False
    loose: bool = False
    began: int = 0
    prepared: dict[str, Any] | None = None
    length: int | None = None
    totals: list[int] = field(default_factory=list)
    totals_of: dict[str, list[int]] = field(default_factory=dict)
    shown_of: dict[str, list[Tensor]] = field(default_factory=dict)
    plans: list[RowPlan] = field(default_factory=list)
    looked: PromptOnHost | None = None
    unmarked: bool = False
    open_ended: list[str | None] = field(default_factory=list)
    words: list[Tensor] | None = None
    marks: dict[str, list[list[Marks]]] = field(default_factory=dict)
    flat: dict[str, FlatMarks] = field(default_factory=dict)
    layouts: dict[str, list[list[Layout]]] = field(default_factory=dict)
    encoded: list[EncoderRun] = field(default_factory=list)
    prefill: Prefill | None = None
    media: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Tensor] = field(default_factory=dict)
    cache: Any = None
    steps: int = 0
    kernels: set[str] = field(default_factory=fresh_log)
    whole: bool = False
    shows_all: bool = False

    def passes(self, arguments: dict[str, Any]) -> None:
        """A pass that belongs to a `generate` begins."""
        prepared, self.prepared = self.prepared, None
        mask = arguments.get("attention_mask")
        if self.prefill is None:
            seen = self.looked
            self.whole = seen is not None and seen.whole and seen.knows(arguments.get("input_ids"), mask)
        self.shows_all = self.whole and prepared is not None and prepared.get("attention_mask") is mask
        if self.prefill is None:
            names = (*self.media, "mm_encoder_outputs")
            self.media = {name: arguments[name] for name in names if arguments.get(name) is not None}

    def out_of_the_loss(self, gone: Tensor) -> None:
        """A dropped token predicts nothing: the labels of what follows the tokens `gone`, (B, length) bool, go."""
        for name, labels in self.labels.items():
            dropped = gone.to(labels.device)
            if name == "labels":
                labels[:, 1:].masked_fill_(dropped[:, :-1], -100)
            else:
                labels.masked_fill_(dropped, -100)


@dataclass
class Forward:
    """One pass through the text model.

    Attributes:
        length: logical tokens of the chunk.
        begins: see `start`; asked at most once, before the first layer has run.
        batch: rows.
        cache: the adopted cache, or None.
        media: the vision tokens of this pass; None if it has none.
        rows: (B, n) long, chunk index of each current row, PAD on padding; None while all rows are there.
        padded: whether `rows` holds PAD.
        record: what the trace learns about this pass, None if it describes another one.
        attention: captured at the last filter layer: (B, T, n), or (B, 2, n), on its way to the host, where the pruner
            needs no more than the sum and the maximum over the text rows.
        keys: (B, n, G * D) captured there too, if the scorer reads them.
        readings: per decoder layer, what rows of the prompt gave to the entries of its cache, where that ranks them.
        memo: masks and positions shared by layers of one layout.
        flash: whether the text model runs a flash-attention kernel.
        idle: whether layers have at most a mask to map: one token, over growing caches of which nothing is read.
        free: whether an idle one maps no mask either: every cache layer is what transformers takes it for.
        lent: decoder layers whose caches are cut when the pass has ended: see `mustdrop.kv.Slots.lends`.
        mask: the attention mask as the caller gave it, which says what is padding.
        later: what tokens after the prompt can see, once a cache policy has asked.
        shrinks: whether it brings a newer picture to a chat whose older ones shrink then.
        landed: whether it ran straight, and all of it has been noted (`mustdrop.runtime.language.straight_record`).
    """

    length: int
    begins: Callable[[], int]
    batch: int
    cache: Any = None
    media: VisionTokens | None = None
    rows: Tensor | None = None
    padded: bool = False
    record: Prefill | None = None
    attention: Tensor | Sent | None = None
    keys: Tensor | None = None
    readings: dict[int, LayerReading] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    flash: bool = False
    idle: bool = False
    free: bool = False
    lent: range = range(0)
    mask: Any = None
    later: LaterTokens | None = None
    shrinks: bool = False
    landed: bool = False

    @functools.cached_property
    def start(self) -> int:
        """Logical tokens that the cache held before."""
        return self.begins()

    @property
    def end(self) -> int:
        """Logical tokens of the sequence, those of the chunk included."""
        return self.start + self.length

    @property
    def index(self) -> Tensor:
        """(B, n) chunk index of each current row."""
        if self.rows is not None:
            return self.rows
        return self._all

    @functools.cached_property
    def _all(self) -> Tensor:
        return torch.arange(self.length, dtype=torch.long, device="cpu").expand(self.batch, -1)

    def current(self, x: Tensor) -> Tensor:
        """(B, n) values of a (B, length) bool tensor at the current rows, False on padding."""
        if self.rows is None:
            return x
        key = ("current", id(x))
        if key not in self.memo:
            made = take(on(x, self.rows.device), self.rows, 1, self.padded)
            self.memo[key] = (x, made & (self.rows != PAD) if self.padded else made)
        return self.memo[key][1]  # type: ignore[no-any-return]


class Local(threading.local):
    """State of one thread: of the call that runs, and what was put aside of those around it.

    Copying a model copies no state.
    """

    def __init__(self) -> None:
        self.aside: list[tuple[dict[str, Any], set[str]]] = []
        self._clear()

    def _clear(self) -> None:
        self.call: Call | None = None
        self.levels: tuple[int, ...] = ()  # of the modules that the pass is in: the whole model, the base, the text
        self.reached = 0  # the deepest of them in this pass
        self.arrived: object = None  # the module whose hooks have run, on the way into its forward
        self.frame: FrameType | None = None  # of the outermost module that the pass is in; it runs until that is done
        self.forward: Forward | None = None
        self.kinds: Tensor | None = None  # (B, S) long: index of the modality, -1 for text
        self.mask: Tensor | None = None  # the 2-D attention mask of the base model's call
        self.encoder: Any = None
        self.capture: object = None
        self.straight: Straight | None = None  # the pass through the text model that runs, where it runs straight
        self.coming: dict[str, Any] | None = None  # arguments of the base model, where the text model is compiled
        self.dropped: Tensor | None = None  # rows of features that pass through a module after `get_*_features`
        self.inside = False

    def begin(self, make: Callable[[], Call]) -> Call:
        """Put the state of this thread aside and begin a call; without it, if the call cannot begin."""
        self.aside.append(({name: value for name, value in vars(self).items() if name != "aside"}, current_log()))
        self._clear()
        try:
            self.call = make()
        except BaseException:
            self.end()
            raise
        return self.call

    def end(self, depth: int | None = None) -> None:
        """Drop the innermost call, or all those inside `depth` others, and go on with the one around it."""
        keep = len(self.aside) - 1 if depth is None else depth
        state, log = self.aside[keep]
        del self.aside[keep:]
        vars(self).update(state)
        log_to(log)

    def __deepcopy__(self, memo: dict[int, Any]) -> Local:
        return Local()

    def __reduce__(self) -> Any:
        return Local, ()
