"""What enters the text model: which tokens are vision, which rows score them, and how many may stay where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop.pruners import answers
from mustdrop.runtime.plan import survivors_of
from mustdrop.runtime.rows import HOST, on
from mustdrop.runtime.state import Call, Marks, Medium

if TYPE_CHECKING:
    from mustdrop.runtime.core import Runtime


@dataclass
class Media:
    """Vision tokens of one pass through the text model, (B, length) each, in logical order. All on the host.

    Attributes:
        vision: bool, vision tokens that the attention mask does not hide.
        places: bool, all vision tokens; each stands for a feature.
        valid: bool, tokens that the attention mask does not hide (padding, mostly).
        alive: bool, all but the vision tokens that the vision stage dropped.
        prompt: bool, valid tokens of the prompt itself.
        text: bool, text after the row's last vision token (see `_raters`).
        raters: bool, those of them that score.
        totals: vision tokens per row.
        padded: whether any token is padding.
        marks: what the vision stage decided, per row over its vision tokens; empty without a vision stage.
        media: per row, its media in the order of the prompt; empty if the encoder did not run.
        ends: bool, vision tokens that end their prompts: they predict what follows, so they stay; None without such.
        pinned: bool, the key set and the ends, or None.
        importance: float, encoder attention, or None.
        order: long, sort key of the rows where they are reordered (compat="released"), or None.
        counts: survivors per filter, each (B,) long, or None where the data decide. An empty tensor says that this
            filter keeps everything in every row, so that it neither scores nor gathers.
        pictures: long, which medium of the pass each token belongs to, -1 for text; None where nobody asks for that.
    """

    vision: Tensor
    places: Tensor
    valid: Tensor
    alive: Tensor
    prompt: Tensor
    text: Tensor
    raters: Tensor
    totals: list[int]
    padded: bool
    marks: list[Marks]
    media: list[list[Medium]]
    ends: Tensor | None = None
    pinned: Tensor | None = None
    importance: Tensor | None = None
    order: Tensor | None = None
    counts: list[Tensor] | None = None
    pictures: Tensor | None = None

    @property
    def reordered(self) -> bool:
        """Whether rows change places even if none of them goes."""
        return self.order is not None and bool((self.order.diff(dim=1) < 0).any())


def read(runtime: Runtime, embeds: Tensor, kinds: Tensor, mask: Tensor | None) -> Media:
    """Everything that the filters need to know about a pass with vision tokens.

    Args:
        runtime: of the patched model.
        embeds: (B, length, C) input of the text model; dropped features are rows of NaN.
        kinds: (B, length) long, index of each token's modality, -1 for text. On the host.
        mask: (B, length or more) attention mask, or None.
    """
    call = runtime.local.call
    forward = runtime.local.forward
    looked = None if call is None else call.looked
    if looked is not None and looked.kinds is kinds:
        valid = looked.valid
    else:
        valid = valid_tokens(kinds, mask, forward.start if forward is not None else 0)
    places = kinds >= 0
    vision = places & valid
    names = [modality.name for modality in runtime.modalities]
    found = _media(call, names, kinds)
    marks = _marks(call, found) if found else []
    alive = torch.ones_like(vision)
    if marks and call is not None and not call.unmarked:
        for b, row in enumerate(marks):
            alive[b, places[b]] = row.alive
    elif runtime.method.vision is not None:  # only the rows themselves know
        alive = ~(places & embeds[..., 0].isnan().to(HOST))
    totals = vision.sum(1).tolist()
    prompt = _prompt(valid, call)
    raters = text = _raters(vision, prompt)
    prefill = runtime.method.prefill
    if prefill is not None and prefill.score is not None:
        entering, given = on(vision & alive, embeds.device), on(raters, embeds.device)
        raters = answers.raters(prefill.score, embeds.nan_to_num(0.0), entering, given).to(HOST)
    media = Media(vision, places, valid, alive, prompt, text, raters, totals, not bool(valid.all()), marks, found)
    if media.marks:
        _spread_marks(media, reorder=runtime.method.renumber)
    _pin_the_end(media, call)
    if prefill is not None and (prefill.keep is not None or prefill.survivors is not None):
        media.counts = _counts(runtime, media)
    return media


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


def last_token(valid: Tensor) -> Tensor:
    """(B, length) bool, True at the last valid token of each row."""
    index = torch.arange(valid.shape[1], dtype=torch.long, device=valid.device)
    return index == torch.where(valid, index, -1).amax(1, keepdim=True)


def words(embeds: Tensor, vision: Tensor, valid: Tensor) -> list[Tensor]:
    """Per row (T, C), embeddings of the text after the last vision token; of all text where none follows.

    Args:
        embeds: (B, length, C) embeddings of the prompt's tokens, of which those of vision tokens are not looked at.
        vision: (B, length) bool.
        valid: (B, length) bool, tokens that are not padding.
    """
    index = torch.arange(vision.shape[1], dtype=torch.long, device=vision.device)
    text = valid & ~vision
    behind = text & (index > torch.where(vision, index, -1).amax(1, keepdim=True))
    text = torch.where(behind.any(1, keepdim=True), behind, text)
    return [row[keep] for row, keep in zip(embeds, text.to(embeds.device), strict=True)]


def _prompt(valid: Tensor, call: Call | None) -> Tensor:
    """(B, length) bool, valid tokens of the prompt.

    What `generate` appended to it (drafts, or its answer so far where there is no cache) decides nothing.
    """
    if call is None or call.length is None:
        return valid
    return valid & (torch.arange(valid.shape[1], dtype=torch.long, device=valid.device) < call.length)


def _pin_the_end(media: Media, call: Call | None) -> None:
    """Where a prompt ends with a vision token, that token predicts what follows: it stays, before all others."""
    end = media.vision & last_token(_prompt(media.valid, call))
    if not bool(end.any()):
        return
    media.ends, nothing = end, torch.zeros_like(end)
    media.pinned = end | (nothing if media.pinned is None else media.pinned)
    media.importance = (nothing.float() if media.importance is None else media.importance).masked_fill(end, torch.inf)


def _raters(vision: Tensor, valid: Tensor) -> Tensor:
    """Text after the row's last vision token; without text the last token.

    `valid` marks the tokens of the prompt. Labels decide nothing: what is dropped is the same with and without them.
    """
    index = torch.arange(vision.shape[1], dtype=torch.long, device=vision.device)
    last = torch.where(vision, index, -1).amax(1, keepdim=True)
    text = valid & ~vision & (index > last)
    return torch.where(text.any(1, keepdim=True), text, last_token(valid))


def _media(call: Call | None, names: list[str], kinds: Tensor) -> list[list[Medium]]:
    """Media per batch row, repeated where the batch was expanded for beams; empty if the encoder saw other media.

    Args:
        call: of this pass.
        names: of the modalities.
        kinds: (B, length) long, index of each token's modality, -1 for text.
    """
    if call is None or not call.layouts:
        return []
    prompts = max(len(rows) for rows in call.layouts.values())
    if not prompts or len(kinds) % prompts:
        return []
    times = len(kinds) // prompts
    out = []
    for row, own in enumerate(kinds):
        own = own[own >= 0]
        media = []
        for i, name in enumerate(names):
            place = (own == i).nonzero()[:, 0]
            layouts = call.layouts.get(name, [[]] * prompts)[row // times]
            sizes = [layout.size for layout in layouts]
            if sum(sizes) != len(place):
                return []
            media += [Medium(name, *pair) for pair in zip(layouts, place.split(sizes), strict=True) if len(pair[1])]
        out.append(sorted(media, key=lambda medium: int(medium.index[0])))
    return out


def _marks(call: Call | None, media: list[list[Medium]]) -> list[Marks]:
    """What the vision stage decided, per batch row over its vision tokens; empty without one."""
    if call is None or not call.marks:
        return []
    by_layout = {
        id(layout): mark
        for kind, rows in call.marks.items()
        for layouts, marks in zip(call.layouts[kind], rows, strict=True)
        for layout, mark in zip(layouts, marks, strict=True)
    }
    rows = []
    for own in media:
        pairs = [(medium.index, by_layout[id(medium.layout)].to(HOST)) for medium in own]
        if len(pairs) == 1:  # its features are all the vision tokens of the prompt, in their order
            mark = pairs[0][1]
            rows.append(Marks(mark.alive, mark.pinned, mark.importance.float(), mark.order, mark.assignment))
            continue
        n = sum(len(index) for index, _ in pairs)
        row = Marks(
            alive=torch.ones(n, dtype=torch.bool, device=HOST),
            pinned=torch.zeros(n, dtype=torch.bool, device=HOST),
            importance=torch.zeros(n, dtype=torch.float32, device=HOST),
            order=torch.arange(n, dtype=torch.long, device=HOST),
            assignment=torch.arange(n, dtype=torch.long, device=HOST),
        )
        for index, mark in pairs:
            row.alive[index], row.pinned[index] = mark.alive, mark.pinned
            row.importance[index] = mark.importance.float()
            row.order[index] = index[mark.order]
            row.assignment[index] = torch.where(mark.assignment < 0, -1, index[mark.assignment.clamp(min=0)])
        rows.append(row)
    return rows


def _spread_marks(media: Media, reorder: bool) -> None:
    """Write the marks of each row to the positions of its vision tokens."""
    media.pinned = torch.zeros_like(media.vision)
    media.importance = torch.zeros(media.vision.shape, dtype=torch.float32, device=HOST)
    if reorder:
        media.order = torch.arange(media.vision.shape[1], dtype=torch.long, device=HOST).repeat(len(media.vision), 1)
    for b, row in enumerate(media.marks):
        place = media.places[b].nonzero()[:, 0]
        seen = media.valid[b, place] if media.padded else None
        if seen is not None and not bool(seen.all()):  # what the mask hides does not enter, whatever became of it
            row.alive, row.pinned = row.alive & seen, row.pinned & seen
            there = (row.assignment >= 0) & row.alive[row.assignment.clamp(min=0)] & seen
            row.assignment = row.assignment.masked_fill(~there, -1)
        media.pinned[b, place], media.importance[b, place] = row.pinned, row.importance
        if media.order is not None:
            media.order[b, place] = place[row.order]


def _counts(runtime: Runtime, media: Media) -> list[Tensor]:
    """Survivors per filter under the budget, from what really enters."""
    present = (media.vision & media.alive).sum(1).tolist()
    rows: list[tuple[int, ...]] = []
    prefill = runtime.method.prefill
    for plan, entering in zip(runtime.plan_batch(media.totals), present, strict=True):
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
        counts.append(torch.tensor(wanted if wanted != present else [], dtype=torch.long, device=HOST))
        present = wanted
    return counts
