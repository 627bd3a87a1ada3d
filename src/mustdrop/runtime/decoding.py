"""The decode socket at work: attention is read for the cache layers, and the entries of least score leave them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mustdrop import kernels, kv
from mustdrop.compat import Span
from mustdrop.errors import MustDropError
from mustdrop.pruners import CacheScorer, DecodeCachePruner, Received, answers
from mustdrop.runtime import parallel
from mustdrop.runtime.block_masks import Mask
from mustdrop.runtime.masks import visible_keys
from mustdrop.runtime.rows import PAD, on, pack
from mustdrop.runtime.state import Call, Forward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mustdrop.runtime.entry import Media

#: Rows x keys of a mask that may exist at once, in elements, where all rows of a prompt are read.
AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Asked:
    """One call of an attention function.

    Attributes:
        q: (B, H, n, D) queries.
        k: (B, G, K, D) keys of the filled slots.
        mask: what the function got, cut to these slots.
        scaling: factor on the logits.
        softcap: see `mustdrop.kernels.row_probabilities`.
        group: processes that share the heads in tensor parallel, else None.
        seen: (B, R, K) bool, keys that the rows to be read see, where that is known; None: the mask says it.
    """

    q: Tensor
    k: Tensor
    mask: Mask
    scaling: float
    softcap: float | None
    group: ProcessGroup | None = None
    seen: Tensor | None = None

    @classmethod
    def of(
        cls, module: nn.Module, q: Tensor, k: Tensor, mask: Mask, kwargs: dict[str, Any], stored: int | None
    ) -> Asked:
        """From the arguments of the function; `stored` slots of `k` are filled (None: all)."""
        if stored is not None:  # a static cache hands out room for later tokens too
            k, mask = k[:, :, :stored], mask[..., :stored] if isinstance(mask, Tensor) else mask
        scaling = kwargs.get("scaling") or getattr(module, "scaling", None) or q.shape[-1] ** -0.5
        return cls(q, k, mask, scaling, kwargs.get("softcap"), parallel.group_of(module))

    def arguments(self, rows: Tensor, first: int = 0) -> tuple[Any, ...]:
        """Arguments of the kernels that read query rows (B, R), -1 on padding; keys before `first` give no result."""
        bias, visible = None, self.seen
        if visible is None:
            visible, bias = visible_keys(rows, self.mask, self.q.shape[2], self.k.shape[2])
        return self.q, self.k, rows, visible, self.scaling, bias, self.softcap, first

    def over_heads(self, x: Tensor) -> Tensor:
        """A mean over the heads that are here as the mean over all heads."""
        return parallel.mean_over_heads(x, self.group)

    def probabilities(self, rows: Tensor, first: int) -> Tensor:
        """(B, R, K - first) head-mean attention of query rows (B, R)."""
        return self.over_heads(kernels.row_probabilities(*self.arguments(rows, first)))

    def statistics(self, rows: Tensor, first: int) -> Tensor:
        """(B, 2, K - first) sum and maximum of it over the rows."""
        if self.group is None:
            return kernels.text_statistics(*self.arguments(rows, first))
        # the maximum is one of the mean over all heads, so the rows must be there when the processes meet
        total = self.q.new_zeros(rows.shape[0], self.k.shape[2] - first, dtype=torch.float32)
        peak = total
        for part in torch.split(rows, self.at_once(rows), dim=1) if rows.shape[1] else ():
            given = self.probabilities(part, first)
            total, peak = total + given.sum(1), torch.maximum(peak, given.amax(1))
        return torch.stack([total, peak], 1)

    def at_once(self, rows: Tensor) -> int:
        """How many of the rows (B, R) may meet the keys at once."""
        return max(1, AT_ONCE // max(1, rows.shape[0] * self.k.shape[2]))


@dataclass(frozen=True)
class Later:
    """What tokens after the prompt, or from a decode step on, can still see.

    Attributes:
        spans: per decoder layer, its window or chunks, or None.
        end: logical position of the next token.
        padding: (B, 1) long, tokens of padding on the left.
    """

    spans: list[Span | None]
    end: int
    padding: Tensor | int = 0

    @classmethod
    def of(cls, spans: list[Span | None], forward: Forward, call: Call | None) -> Later:
        """After the prompt of a pass; in a pass without media, its own tokens count. Found once per pass.

        Drafts may be taken back, so the prompt ends before them.
        """
        if forward.later is None:
            end, mask = forward.start, forward.mask
            if forward.media is not None:
                length = None if call is None else call.length
                end += forward.length if length is None else min(length, forward.length)
            padding: Tensor | int = 0
            if isinstance(mask, Tensor) and mask.ndim == 2 and any(span and span.chunked for span in spans):
                padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
            forward.later = cls(spans, end, padding)
        return forward.later

    def candidates(self, i: int, layer: kv.Slots) -> Tensor:
        """(B, slots) bool, the vision entries of decoder layer `i` that such a token sees; the others are lost."""
        vision, positions, span = layer.slot_vision(), layer.slot_positions(), self.spans[i]
        assert vision is not None, "a layer without entries"
        assert positions is not None, "a layer without entries"
        if span is None:
            return vision
        first = span.reach(self.end, self.padding)
        return vision & (positions >= (on(first, positions.device) if isinstance(first, Tensor) else first))


def read_prompt(
    scorer: CacheScorer, layer: kv.Slots, forward: Forward, media: Media, asked: Asked, vision: Tensor
) -> Tensor:
    """Note what the prompt's rows give to the entries of a layer, those of earlier turns included.

    Args:
        scorer: which rows, and what of them.
        layer: cache layer that has just received the rows of this pass.
        forward: the pass.
        media: its vision tokens.
        asked: the layer's attention.
        vision: (B, slots) bool, entries that compete for the layer's budget.

    Returns:
        (B, R) rows that were read, -1 on padding.
    """
    prompt = forward.current(media.prompt)
    rows = on(pack(answers.rows(scorer, forward.current(media.text) & prompt, prompt)), asked.q.device)
    if scorer.by_row:
        arguments = asked.arguments(rows)
        attention = asked.over_heads(kernels.row_probabilities(*arguments))
        own = (rows + asked.k.shape[2] - asked.q.shape[2]).masked_fill(rows == PAD, PAD)
        read = Received(answers.gathered(scorer, attention, own), _seeing(rows, arguments[3]))
        mass = attention.sum(1)
    else:
        parts = [_sums(asked, part) for part in torch.split(rows, asked.at_once(rows), dim=1)]
        read = sum(parts[1:], start=parts[0])
        mass = read.given
    layer.attended, layer.queries = read.given, read.queries
    if scorer.by_layer:
        forward.masses.append((mass * on(vision, mass.device)).sum(1))
    return rows


def read_step(scorer: CacheScorer, layer: Any, asked: Asked, valid: Tensor) -> None:
    """Add what the newest tokens give to what is known of a layer.

    Args:
        scorer: which of them are asked, and what becomes of what they give.
        layer: cache layer that has just received them.
        asked: the layer's attention.
        valid: (B, q) bool, tokens of this pass that are not padding.
    """
    if layer.positions is None:
        return
    asks = on(valid if valid.shape[1] == 1 else scorer.rows(valid, valid), asked.q.device)
    rows = torch.arange(asks.shape[1], dtype=torch.long, device=asks.device).expand_as(asks).masked_fill(~asks, PAD)
    step = _sums(asked, rows)
    n = layer.positions.shape[1]
    step = Received(step.given[:, :n], step.queries[:, :n])
    if layer.attended is None or layer.queries is None:
        layer.attended, layer.queries = step.given, step.queries
        return
    known = Received(layer.attended, layer.queries)
    read, some = answers.added(scorer, known, step), asks.any(1, keepdim=True)  # a row of padding alone adds nothing
    layer.attended = torch.where(some, read.given, known.given)
    layer.queries = torch.where(some, read.queries, known.queries)


def before_step(decode: DecodeCachePruner | None, cache: Any, later: Later) -> None:
    """Before a decode step: the vision entries of least score leave if it is time."""
    if decode is None or not decode.reads_steps or cache is None:
        return
    for i, layer in enumerate(cache.layers[: len(later.spans)]):
        if layer.attended is not None and decode.due(layer.steps + 1):
            _evict(decode, layer, decode.counts(layer.totals), later.candidates(i, layer))


def after_prompt(decode: DecodeCachePruner | None, forward: Forward, later: Later) -> None:
    """At the end of the prefill: the vision entries of least score leave, where the pruner says so."""
    if decode is None or not decode.after_prefill or forward.cache is None:
        return
    depth = len(later.spans)
    layers = forward.cache.layers[:depth]
    unread = [i for i, layer in enumerate(layers) if layer.attended is None]
    if unread:
        raise MustDropError(
            f"decoder layers {unread} ran without their attention being read: their attention modules do not ask their "
            "config which function to use."
        )
    count = decode.counts(layers[0].totals)
    budgets = [count] * depth
    candidates = [later.candidates(i, layer) for i, layer in enumerate(layers)]
    if decode.scorer.by_layer:
        entries = torch.stack([own.sum(1).cpu() for own in candidates])
        mass = torch.stack([own.cpu() for own in forward.masses])
        budgets = list(answers.budgets(decode.scorer, mass, count.cpu(), entries))
    held = torch.stack([layer.slot_vision().sum(1).cpu() for layer in layers])
    everything = (held <= count.cpu()).all(0)
    for layer, own, vision in zip(layers, budgets, candidates, strict=True):
        _evict(decode, layer, own, vision, everything)
        layer.attended = layer.queries = None  # nothing is read any more


def _evict(
    decode: DecodeCachePruner, layer: Any, count: Tensor, candidates: Tensor, everything: Tensor | None = None
) -> None:
    """The best of the candidates stay, and what no later token sees leaves with the rest.

    Args:
        decode: chooses.
        layer: cache layer.
        count: (B,) long, vision entries that may stay.
        candidates: (B, slots) bool, vision entries that a later token sees.
        everything: (B,) bool, rows whose budget has room for all vision entries of all layers. Where it has room for
            those of a layer, nothing leaves it.
    """
    pad = (0, layer.slots - layer.attended.shape[1])
    read = Received(nn.functional.pad(layer.attended, pad), nn.functional.pad(layer.queries, pad))
    vision = layer.slot_vision()
    fits = vision.sum(1) <= on(count, vision.device)
    if everything is not None:
        fits |= on(everything, vision.device)
    seen = on(candidates, read.given.device)
    score = answers.entries(decode.scorer, read, seen)
    best = decode(score, seen, on(count, score.device)).mask(layer.slots)
    layer.evict(on(best, vision.device) & (candidates | ~vision) | fits[:, None])


def _sums(asked: Asked, rows: Tensor) -> Received:
    """Sum over query rows (B, R), without making the rows where there are several."""
    arguments = asked.arguments(rows)
    one = rows.shape[1] == 1
    given = (kernels.row_probabilities if one else kernels.text_statistics)(*arguments)[:, 0]
    return Received(asked.over_heads(given), _seeing(rows, arguments[3]))


def _seeing(rows: Tensor, visible: Tensor) -> Tensor:
    """(B, K) float32, how many of the rows see each key."""
    return (visible & (rows != PAD)[..., None]).sum(1).float()
