"""What enters the text model: which tokens are vision, which rows score them, and how many may stay where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import sent
from mustdrop.indices import HOST, on
from mustdrop.pruners import answers
from mustdrop.runtime.language import fixed_rows
from mustdrop.runtime.language.fixed_rows import FixedRows
from mustdrop.runtime.language.prompt_media import PromptMedia
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
        text: bool, text after the row's last vision token (see `_raters`).
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
    vision, prompt = places & shown, _prompt(shown, call)
    text, ends = _raters(vision, prompt), vision & last_token(prompt)
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


def valid_tokens(tokens: Tensor, mask: Any, start: int = 0) -> Tensor:
    """(B, length) bool, tokens of this pass that are not padding, as the attention mask says (all without one).

    Args:
        tokens: (B, length), for the shape.
        mask: None, (B, keys), or what `generate` makes of that for a static cache: (B or 1, 1, length, keys), or a dict
            of such. There, padding is what no token sees.
        start: logical position of the first token; a mask may cover keys after the last one, as for a static cache.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[3] >= start + tokens.shape[1]:
        here = mask[:, 0, :, start : start + tokens.shape[1]]
        seen = here if here.dtype == torch.bool else here > torch.finfo(here.dtype).min / 2
        return seen.any(1).to(tokens.device).expand(tokens.shape[0], -1)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        end = start + tokens.shape[1]
        here = mask[:, start:end] if mask.shape[1] > end else mask[:, -tokens.shape[1] :]
        return here.to(tokens.device, torch.bool, copy=True)  # the caller's mask may change before a trace is made
    return torch.ones_like(tokens, dtype=torch.bool)


def last_token(valid: np.ndarray) -> np.ndarray:
    """(B, length) bool, True at the last valid token of each row."""
    last: np.ndarray = valid & (valid[:, ::-1].cumsum(1)[:, ::-1] == 1)
    return last


def words(embeds: Tensor, vision: np.ndarray, valid: np.ndarray) -> list[Tensor]:
    """Per row (T, C), embeddings of the text after the last vision token; of all text where none follows.

    Args:
        embeds: (B, length, C) embeddings of the prompt's tokens, of which those of vision tokens are not looked at.
        vision: (B, length) bool.
        valid: (B, length) bool, tokens that are not padding.
    """
    text = valid & ~vision
    behind = text & (vision[:, ::-1].cumsum(1)[:, ::-1] == 0)  # no vision token here or later
    text = np.where(behind.any(1, keepdims=True), behind, text)
    places = [np.flatnonzero(row) for row in text]
    if len({len(place) for place in places}) == 1:
        return list(kernels.gather_rows([embeds], sent(np.stack(places), embeds.device))[0].unbind(0))
    return [row[sent(place, embeds.device)] for row, place in zip(embeds, places, strict=True)]


def _prompt(valid: np.ndarray, call: Call | None) -> np.ndarray:
    """(B, length) bool, valid tokens of the prompt.

    What `generate` appended to it (drafts, or its answer so far where there is no cache) decides nothing.
    """
    if call is None or call.length is None:
        return valid
    return valid & (np.arange(valid.shape[1]) < call.length)


def _pin_the_end(media: VisionTokens, end: Tensor) -> None:
    """Where a prompt ends with a vision token, that token predicts what follows: it stays, before all others."""
    nothing = torch.zeros_like(end)
    media.protected = end | (nothing if media.protected is None else media.protected)
    media.importance = (nothing.float() if media.importance is None else media.importance).masked_fill(end, torch.inf)


def _raters(vision: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Text after the row's last vision token; without text the last token.

    `valid` marks the tokens of the prompt. Labels decide nothing: what is dropped is the same with and without them.
    """
    behind = vision[:, ::-1].cumsum(1)[:, ::-1] == 0  # no vision token here or later
    text = valid & ~vision & behind
    return np.where(text.any(1, keepdims=True), text, last_token(valid))


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
