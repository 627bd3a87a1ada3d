"""What enters the text model: which tokens are vision, which rows score them, and how many may stay where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mustdrop.constants import sent
from mustdrop.indices import HOST, on
from mustdrop.pruners import answers
from mustdrop.runtime.language import fixed_rows
from mustdrop.runtime.language.fixed_rows import FixedRows
from mustdrop.runtime.language.prompt_media import PromptMedia
from mustdrop.runtime.language.text_rows import last_token, prompt_tokens, raters, valid_tokens
from mustdrop.runtime.plan import survivors_of
from mustdrop.runtime.records import FlatMarks, Marks
from mustdrop.runtime.state import Call

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime


@dataclass
class VisionTokens:
    """Vision tokens of one pass through the text model, (B, length) each, in logical order. All on the host.

    Attributes:
        vision: bool, vision tokens that the attention mask does not hide.
        places: bool, all vision tokens; each stands for a feature.
        valid: bool, tokens that the attention mask does not hide (padding, mostly).
        whole: whether the vision stage dropped none of them.
        prompt: bool, valid tokens of the prompt itself.
        text: bool, text after the row's last vision token (see `text_rows.raters`).
        raters: bool, those of them that score.
        totals: vision tokens per row.
        padded: whether any token is padding.
        marks: what the vision stage decided, per row over its vision tokens; empty without a vision stage, and where
            `fixed` knows.
        shown: the media of each row.
        alive: bool, all but the vision tokens that the vision stage dropped. On the device with `fixed`.
        ends: bool, vision tokens that end their prompts: they predict what follows, so they stay; None without such.
        protected: bool, the key set and the ends, or None.
        importance: float, encoder attention, or None.
        order: long, sort key of the rows where they are reordered (compat="released"), or None.
        counts: survivors per filter and row, or None where the data decide. Empty for a filter that keeps everything in
            every row, so that it neither scores nor gathers.
        pictures: long, which medium of the pass each token belongs to, -1 for text; None where nobody asks for that.
        fixed: the rows on the device, where all counts are known beforehand.
    """

    vision: Tensor
    places: Tensor
    valid: Tensor
    whole: bool
    prompt: Tensor
    text: Tensor
    raters: Tensor
    totals: list[int]
    padded: bool
    marks: list[Marks]
    shown: PromptMedia
    alive: Tensor
    ends: Tensor | None = None
    protected: Tensor | None = None
    importance: Tensor | None = None
    order: Tensor | None = None
    counts: list[list[int]] | None = None
    pictures: Tensor | None = None
    fixed: FixedRows | None = None

    @property
    def reordered(self) -> bool:
        """Whether rows change places even if none of them goes."""
        return self.order is not None and bool((self.order.diff(dim=1) < 0).any())


def read(runtime: Runtime, embeds: Tensor, kinds: Tensor, mask: Tensor | None) -> VisionTokens:
    """Everything that the filters need to know about a pass with vision tokens.

    Args:
        runtime: of the patched model.
        embeds: (B, length, C) input of the text model; dropped features are rows of NaN.
        kinds: (B, length) long, index of each token's modality, -1 for text. On the host.
        mask: (B, length or more) attention mask, or None.
    """
    media, tables = _tokens(runtime, kinds, mask)
    call = runtime.local.call
    if not runtime.method.marks and runtime.method.prefill is None and runtime.engine is None:
        return media  # all of it stays
    if fixed_rows.possible(runtime, call, kinds, media.ends is not None):
        _fixed(runtime, media, embeds.device, tables, call)
    else:
        _look(runtime, media, embeds, call)
    return media


def counted(runtime: Runtime, device: torch.device, kinds: Tensor, mask: Tensor | None) -> VisionTokens | None:
    """As `read`, before there are embeddings, for tables on `device`; None where the answer lies in these."""
    media, tables = _tokens(runtime, kinds, mask)
    call, prefill = runtime.local.call, runtime.method.prefill
    if fixed_rows.possible(runtime, call, kinds, media.ends is not None):
        _fixed(runtime, media, device, tables, call)
        return media
    if fixed_rows.names_raters(prefill) is not None:
        return None
    marked = not runtime.method.marks or (media.shown.media and call is not None and call.marks and not call.unmarked)
    if not marked or (prefill is not None and not fixed_rows.leaves_a_number(prefill, media.ends is not None)):
        return None
    _look(runtime, media, torch.empty(0, dtype=torch.float32, device=device), call)
    return media


#: (B, length) each: long, kinds; bool, vision tokens, valid ones, those that score.
_Tables = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _tokens(runtime: Runtime, kinds: Tensor, mask: Tensor | None) -> tuple[VisionTokens, _Tables]:
    """What the host knows of the tokens, and the same as tables."""
    call = runtime.local.call
    forward = runtime.local.forward
    looked = None if call is None else call.looked
    if looked is not None and looked.kinds is kinds:
        valid, (own, shown) = looked.valid, looked.tables
    else:
        valid = valid_tokens(kinds, mask, forward.start if forward is not None else 0)
        own, shown = kinds.numpy(), valid.numpy()
    places = own >= 0
    vision, prompt = places & shown, prompt_tokens(shown, None if call is None else call.length)
    text, ends = raters(vision, prompt), vision & last_token(prompt)
    found = PromptMedia.of(call, [modality.name for modality in runtime.modalities], own)
    made = [torch.from_numpy(x) for x in (vision, places, prompt, text)]
    media = VisionTokens(
        made[0], made[1], valid, True, made[2], made[3], made[3], vision.sum(1).tolist(), not bool(shown.all()), [],
        found, made[0], ends=torch.from_numpy(ends) if ends.any() else None,
    )  # fmt: skip
    return media, (own, vision, shown, text)


def _look(runtime: Runtime, media: VisionTokens, embeds: Tensor, call: Call | None) -> None:
    """The host looks at what was decided: marks, scoring rows, counts."""
    media.marks = media.shown.spread()
    media.alive = torch.ones_like(media.vision)
    if media.marks and call is not None and not call.unmarked:
        for b, row in enumerate(media.marks):
            media.alive[b, media.places[b]] = row.alive
    elif runtime.method.marks:  # only the rows themselves know
        media.alive = ~(media.places & embeds[..., 0].isnan().to(HOST))
    media.whole = bool(media.alive.all())
    prefill = runtime.method.prefill
    scorer = fixed_rows.names_raters(prefill)
    if scorer is not None:
        entering, given = on(media.vision & media.alive, embeds.device), on(media.raters, embeds.device)
        media.raters = answers.raters(scorer, embeds.nan_to_num(0.0), entering, given).to(HOST)
    if media.marks:
        _spread_marks(media, reorder=runtime.method.reorder)
    if media.ends is not None:
        _pin_the_end(media, media.ends)
    if prefill is not None and (prefill.keep is not None or prefill.survivors is not None):
        media.counts = _counts(runtime, media.totals, (media.vision & media.alive).sum(1).tolist())


def _fixed(
    runtime: Runtime,
    media: VisionTokens,
    device: torch.device,
    tables: _Tables,
    call: Call | None,
) -> None:
    """All counts are known: what the filters need goes to the device, and nothing comes back."""
    kinds, vision, valid, raters = tables
    here, is_text = sent(vision, device), sent(valid & ~vision, device)
    padding = sent(~valid, device) if media.padded else None
    alive, present, protected, importance = here, media.totals, None, None
    if runtime.method.marks and call is not None:
        flat = FlatMarks.join([call.flat[m.name] for m in runtime.modalities if m.name in call.flat])
        alive, protected, importance = fixed_rows.entering(flat, sent(_features(runtime, call, kinds), device))
        present = _entering(call, runtime, len(kinds))
    media.whole = present == media.totals
    media.alive = alive
    if media.ends is not None:
        end = on(media.ends, device)
        protected = end if protected is None else protected | end
        importance = end.float() if importance is None else importance
        importance = importance.masked_fill(end, torch.inf)
    prefill = runtime.method.prefill
    if prefill is not None:
        media.counts = _counts(runtime, media.totals, present)
    text = (valid & ~vision).sum(1).tolist()
    scoring = fixed_rows.ScoringRows.of(raters & valid, valid)
    media.fixed = fixed_rows.FixedRows(here, alive, protected, importance, is_text, text, present, scoring, padding)


def _features(runtime: Runtime, call: Call, kinds: np.ndarray) -> np.ndarray:
    """(B, length) long, the feature that each vision token stands for, of all kinds one after the other; -1 for text.

    Where prompts were repeated for beams, so are their features.
    """
    out = np.full(kinds.shape, -1, dtype=np.int64)
    base = 0
    for i, modality in enumerate(runtime.modalities):
        rows = call.layouts.get(modality.name)
        if rows is None:
            continue
        sizes = [sum(layout.size for layout in row) for row in rows]
        first = np.cumsum([0, *sizes[:-1]]) + base
        mine = kinds == i
        times = len(kinds) // max(1, len(rows))
        place = mine.cumsum(1) - 1 + np.repeat(first, times)[:, None]
        out[mine] = place[mine]
        base += sum(sizes)
    return out


def _entering(call: Call, runtime: Runtime, batch: int) -> list[int]:
    """Per row, vision tokens that enter the language model."""
    present = [0] * batch
    for modality in runtime.modalities:
        rows = call.layouts.get(modality.name)
        if rows is None or modality.name not in call.flat:
            continue
        left = iter(call.flat[modality.name].counts)
        each = [sum(next(left) for _ in row) for row in rows]
        for b in range(batch):
            present[b] += each[b // (batch // len(rows))]
    return present


def _pin_the_end(media: VisionTokens, end: Tensor) -> None:
    """Where a prompt ends with a vision token, that token predicts what follows: it stays, before all others."""
    nothing = torch.zeros_like(end)
    media.protected = end | (nothing if media.protected is None else media.protected)
    media.importance = (nothing.float() if media.importance is None else media.importance).masked_fill(end, torch.inf)


def _spread_marks(media: VisionTokens, reorder: bool) -> None:
    """Write the marks of each row to the positions of its vision tokens."""
    media.protected = torch.zeros_like(media.vision)
    media.importance = torch.zeros(media.vision.shape, dtype=torch.float32, device=HOST)
    if reorder:
        media.order = torch.arange(media.vision.shape[1], dtype=torch.long, device=HOST).repeat(len(media.vision), 1)
    for b, row in enumerate(media.marks):
        place = media.places[b].nonzero()[:, 0]
        seen = media.valid[b, place] if media.padded else None
        if seen is not None and not bool(seen.all()):  # what the mask hides does not enter, whatever became of it
            row.alive, row.protected = row.alive & seen, row.protected & seen
            there = (row.into >= 0) & row.alive[row.into.clamp(min=0)] & seen
            row.assignment = row.into.masked_fill(~there, -1)
        media.protected[b, place], media.importance[b, place] = row.protected, row.importance
        if media.order is not None:
            media.order[b, place] = place[row.order]


def _counts(runtime: Runtime, totals: list[int], present: list[int]) -> list[list[int]]:
    """Survivors per filter and row under the budget, from what really enters; empty where a filter keeps everything."""
    rows: list[tuple[int, ...]] = []
    prefill = runtime.method.prefill
    for plan, entering in zip(runtime.plan_batch(totals), present, strict=True):
        tokens = plan.tokens
        if prefill is not None and prefill.survivors is not None:
            rows.append(prefill.left(entering) if entering else (0,) * len(runtime.filters))
        elif tokens is None:
            rows.append((0,) * len(runtime.filters))
        else:
            rows.append(survivors_of(runtime.method, entering, runtime.depth, runtime.filters, tokens, plan.spared))
    counts = []
    for k in range(len(runtime.filters)):
        wanted = [row[k] for row in rows]
        counts.append(wanted if wanted != present else [])
        present = wanted
    return counts
