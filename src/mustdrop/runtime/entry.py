"""What enters the text model: which tokens are vision, which rows score them, and how many may stay where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop import budget
from mustdrop.runtime.state import Call, ImageMarks

if TYPE_CHECKING:
    from mustdrop.runtime.core import Runtime


@dataclass
class Media:
    """Vision tokens of one pass through the text model, (B, length) each, in logical order.

    Attributes:
        vision: bool, vision tokens.
        valid: bool, tokens that are not padding.
        alive: bool, all but the vision tokens that the vision stage dropped.
        raters: bool, text rows that score.
        totals: vision tokens per row.
        padded: whether any token is padding.
        marks: what the vision stage decided, per row and image; empty without a vision stage.
        pinned: bool, the key set, or None.
        importance: float, encoder attention, or None.
        order: long, sort key of the rows where they are reordered (compat="released"), or None.
        counts: survivors per filter, each (B,) long, or None where the data decide. An empty tensor says that this
            filter keeps everything in every row, so that it neither scores nor gathers.
    """

    vision: Tensor
    valid: Tensor
    alive: Tensor
    raters: Tensor
    totals: list[int]
    padded: bool
    marks: list[list[ImageMarks]]
    pinned: Tensor | None = None
    importance: Tensor | None = None
    order: Tensor | None = None
    counts: list[Tensor] | None = None


def read(runtime: Runtime, embeds: Tensor, vision: Tensor, mask: Any) -> Media:
    """Everything that the filters need to know about a pass with vision tokens.

    Args:
        runtime: of the patched model.
        embeds: (B, length, C) input of the text model; dropped features are rows of NaN.
        vision: (B, length) bool.
        mask: `attention_mask` as it came.
    """
    call = runtime.local.call
    vision = vision.to(embeds.device)
    forward = runtime.local.forward
    valid = valid_tokens(vision, mask, forward.start if forward is not None else 0)
    vision = vision & valid
    alive = ~(vision & embeds[..., 0].isnan()) if runtime.encoder is not None else torch.ones_like(vision)
    totals = vision.sum(1).tolist()
    raters = _raters(vision, valid, call)
    media = Media(vision, valid, alive, raters, totals, not bool(valid.all()), _marks(call, totals))
    if media.marks:
        _spread_marks(media, reorder=runtime.method.renumber)
    _pin_the_end(media, call)
    prefill = runtime.method.prefill
    if prefill is not None and prefill.keep is not None:
        media.counts = _counts(runtime, media)
    return media


def valid_tokens(vision: Tensor, mask: Any, start: int = 0) -> Tensor:
    """(B, length) bool, tokens of this pass that are not padding, as the attention mask says (all without one).

    Args:
        vision: (B, length), for the shape.
        mask: None, (B, keys), or what `generate` makes of that for a static cache: (B or 1, 1, length, keys), or a dict
            of such. There, padding is what no token sees.
        start: logical position of the first token; a mask may cover keys after the last one, as for a static cache.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[3] >= start + vision.shape[1]:
        here = mask[:, 0, :, start : start + vision.shape[1]]
        seen = here if here.dtype == torch.bool else here > torch.finfo(here.dtype).min / 2
        return seen.any(1).to(vision.device).expand(vision.shape[0], -1)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        end = start + vision.shape[1]
        here = mask[:, start:end] if mask.shape[1] > end else mask[:, -vision.shape[1] :]
        return here.to(vision.device).bool()
    return torch.ones_like(vision)


def last_token(valid: Tensor) -> Tensor:
    """(B, length) bool, True at the last valid token of each row."""
    index = torch.arange(valid.shape[1], device=valid.device)
    return index == torch.where(valid, index, -1).amax(1, keepdim=True)


def _prompt(valid: Tensor, call: Call | None) -> Tensor:
    """(B, length) bool, valid tokens of the prompt.

    What `generate` appended to it (drafts, or its answer so far where there is no cache) decides nothing.
    """
    if call is None or call.length is None:
        return valid
    return valid & (torch.arange(valid.shape[1], device=valid.device) < call.length)


def _pin_the_end(media: Media, call: Call | None) -> None:
    """Where a prompt ends with a vision token, that token predicts what follows: it stays, before all others."""
    end = media.vision & last_token(_prompt(media.valid, call))
    if not bool(end.any()):
        return
    nothing = torch.zeros_like(end)
    media.pinned = end | (nothing if media.pinned is None else media.pinned)
    media.importance = (nothing.float() if media.importance is None else media.importance).masked_fill(end, torch.inf)


def _raters(vision: Tensor, valid: Tensor, call: Call | None) -> Tensor:
    """Valid text after the row's last vision token; with labels the prompt part of it; without text the last token."""
    index = torch.arange(vision.shape[1], device=vision.device)
    last = torch.where(vision, index, -1).amax(1, keepdim=True)
    valid = _prompt(valid, call)
    text = valid & ~vision & (index > last)
    labels = call.labels if call is not None else None
    if labels is not None and labels.shape == text.shape:
        prompt = text & (labels.to(text.device) == -100)
        text = torch.where(prompt.any(1, keepdim=True), prompt, text)
    return torch.where(text.any(1, keepdim=True), text, last_token(valid))


def _marks(call: Call | None, totals: list[int]) -> list[list[ImageMarks]]:
    """Marks per batch row, repeated where the batch was expanded for beams; empty if they are of other images."""
    if call is None or not call.marks or len(totals) % len(call.marks):
        return []
    times = len(totals) // len(call.marks)
    rows = [row for row in call.marks for _ in range(times)]
    fits = all(sum(len(mark.alive) for mark in row) == total for row, total in zip(rows, totals, strict=True))
    return rows if fits else []


def _spread_marks(media: Media, reorder: bool) -> None:
    """Write the marks of each image to the positions of its tokens."""
    device = media.vision.device
    media.pinned = torch.zeros_like(media.vision)
    media.importance = torch.zeros(media.vision.shape, device=device)
    order = torch.arange(media.vision.shape[1], device=device).expand_as(media.vision).clone()
    for b, row in enumerate(media.marks):
        if not row:
            continue
        place = media.vision[b].nonzero()[:, 0]
        media.pinned[b, place] = torch.cat([mark.pinned for mark in row]).to(device)
        media.importance[b, place] = torch.cat([mark.importance for mark in row]).to(device)
        starts = torch.tensor([0, *[len(mark.alive) for mark in row]], device=device).cumsum(0)
        places = [mark.order.to(device) + start for mark, start in zip(row, starts, strict=False)]
        order[b, place] = place[torch.cat(places)]
    media.order = order if reorder else None


def _counts(runtime: Runtime, media: Media) -> list[Tensor]:
    """Survivors per filter under the budget, from what really enters."""
    present = (media.vision & media.alive).sum(1).tolist()
    rows = []
    for total, entering in zip(media.totals, present, strict=True):
        tokens = runtime.plan(total).tokens
        if tokens is None:
            rows.append((0,) * len(runtime.filters))
        else:
            what = f"keep={runtime.method.prefill.keep if runtime.method.prefill else None}"
            rows.append(budget.spread(entering, runtime.depth, runtime.filters, tokens, what))
    counts = []
    for k in range(len(runtime.filters)):
        wanted = [row[k] for row in rows]
        counts.append(torch.tensor(wanted if wanted != present else [], dtype=torch.long, device=media.vision.device))
        present = wanted
    return counts
