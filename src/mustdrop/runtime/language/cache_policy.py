"""The decode socket at work: attention is read for the cache layers, and the entries of least score leave them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mustdrop import kernels
from mustdrop.errors import MustDropError
from mustdrop.indices import HOST, PAD, on, pack
from mustdrop.pruners import CacheScorer, DecodeCachePruner, Received, answers
from mustdrop.runtime.language import attention_call, cache_cuts
from mustdrop.runtime.language.attention_call import AttentionCall, Sight
from mustdrop.runtime.language.cache_cuts import CacheEntries, stacked
from mustdrop.runtime.language.later_tokens import LaterTokens
from mustdrop.runtime.masks import visible_keys
from mustdrop.runtime.state import Forward

if TYPE_CHECKING:
    from mustdrop.runtime.language.vision_tokens import VisionTokens


@dataclass
class LayerReading:
    """What rows of the prompt gave to the entries of one layer.

    Attributes:
        given: (B, P, n) parts of their sum, or (B, R, n) of each row; after `settle` the (B, n) that ranks.
        queries: (B, n) how many of the rows see each entry.
        own: (B, R) long, the entry of each row's own token, where the rows are seen one by one.
        mass: (B,), what they gave to the candidates in sum, where that splits the budget; None before `settle`.
    """

    given: Tensor
    queries: Tensor
    own: Tensor | None = None
    mass: Tensor | None = None


def read_prompt(
    decode: DecodeCachePruner,
    i: int,
    layer: Any,
    forward: Forward,
    media: VisionTokens,
    asked: AttentionCall,
    later: LaterTokens,
) -> Tensor:
    """Note what the prompt's rows give to the entries of layer `i`, those of earlier turns included.

    Layers that see the same share what says so, and what they give is summed up for all of them at the end.

    Args:
        decode: which rows, and what of them.
        i: number of the layer.
        layer: cache layer that has just received the rows of this pass.
        forward: the pass.
        media: its vision tokens.
        asked: the layer's attention.
        later: what tokens after the prompt see.

    Returns:
        (B, R) rows that were read, -1 on padding.
    """
    scorer = decode.scorer
    rows = _rows(scorer, forward, media, asked.q.device)
    sight, queries = _sight(forward, asked, rows, scorer.by_row or rows.shape[1] <= asked.at_once(rows))
    if scorer.by_row:
        attention = asked.over_heads(kernels.row_probabilities(*asked.arguments(rows, sight=sight)))
        reading = LayerReading(attention, queries, _own(forward, asked, rows))
    elif sight is not None:
        reading = LayerReading(asked.over_heads(kernels.text_sums(*asked.arguments(rows, sight=sight))), queries)
    else:
        parts = [_sums(asked, part) for part in torch.split(rows, asked.at_once(rows), dim=1)]
        read = sum(parts[1:], start=parts[0])
        reading = LayerReading(read.given[:, None], read.queries)
    forward.readings[i] = reading
    if not decode.after_prefill or _unsettled(forward) > attention_call.AT_ONCE:
        settle(decode, forward, later)
    return rows


def _rows(scorer: CacheScorer, forward: Forward, media: VisionTokens, device: torch.device) -> Tensor:
    """(B, R) long, rows of the prompt that are read, -1 on padding; found once for all layers with the same tokens."""
    key = ("read", id(forward.rows), device)
    if key not in forward.memo:
        prompt = forward.current(media.prompt)
        found = pack(answers.rows(scorer, forward.current(media.text) & prompt, prompt))
        forward.memo[key] = (forward.rows, on(found, device))  # holding the rows keeps their id from being used again
    return forward.memo[key][1]  # type: ignore[no-any-return]


def _sight(forward: Forward, asked: AttentionCall, rows: Tensor, whole: bool) -> tuple[Sight | None, Tensor]:
    """What the rows see, and how many see each key; (None, empty) where that is too much to hold as a `whole`."""
    if not whole:
        return None, rows.new_empty(0)
    key = ("sight", id(rows), id(asked.given), asked.q.shape[2], asked.k.shape[2])
    if key not in forward.memo:
        sight = visible_keys(rows, asked.mask, asked.q.shape[2], asked.k.shape[2])
        alone = asked.mask is None and asked.q.shape[2] == asked.k.shape[2]  # then padding, row -1, sees nothing
        queries = sight[0].sum(1, dtype=torch.float32) if alone else _seeing(rows, sight[0])
        forward.memo[key] = (rows, asked.given, sight, queries)
    return forward.memo[key][2:]  # type: ignore[no-any-return]


def _own(forward: Forward, asked: AttentionCall, rows: Tensor) -> Tensor:
    """(B, R) long, the entry of each row's own token, -1 on padding."""
    before = asked.k.shape[2] - asked.q.shape[2]
    if not before:
        return rows
    key = ("own", id(rows), before)
    if key not in forward.memo:
        forward.memo[key] = (rows, (rows + before).masked_fill(rows == PAD, PAD))
    return forward.memo[key][1]  # type: ignore[no-any-return]


def _unsettled(forward: Forward) -> int:
    """Numbers that wait to be summed up."""
    return sum(read.given.numel() for read in forward.readings.values() if read.given.ndim == 3)


def settle(decode: DecodeCachePruner, forward: Forward, later: LaterTokens) -> None:
    """Sum up what has been read and tell the cache layers: those of one shape in one step."""
    alike: dict[Any, list[int]] = {}
    for i, read in forward.readings.items():
        if read.given.ndim == 3:
            alike.setdefault((read.given.shape, id(read.queries), id(read.own), read.given.device), []).append(i)
    for some in alike.values():
        layers = forward.cache.layers
        readings = [forward.readings[i] for i in some]
        given = torch.stack([read.given for read in readings])  # (L, B, P or R, n)
        total, own = given.sum(2), readings[0].own
        mass = total
        if own is not None:
            each = own.expand(len(some), -1, -1).flatten(0, 1)
            total = answers.gathered(decode.scorer, given.flatten(0, 1), each).view_as(total)
        if decode.scorer.by_layer:
            flags = stacked([held.candidates for held in _entries(forward, later, some)])
            mass = (mass * on(flags, mass.device)).sum(-1)
        for i, read, own_total, own_mass in zip(some, readings, total.unbind(), mass.unbind(), strict=True):
            layers[i].attended, layers[i].queries = own_total, read.queries
            read.given, read.own, read.mass = own_total, None, own_mass


def read_step(scorer: CacheScorer, layer: Any, asked: AttentionCall, valid: Tensor) -> None:
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


def before_step(decode: DecodeCachePruner | None, cache: Any, later: LaterTokens) -> None:
    """Before a decode step: the vision entries of least score leave if it is time."""
    if decode is None or not decode.reads_steps or cache is None:
        return
    for i, layer in enumerate(cache.layers[: len(later.spans)]):
        if layer.attended is not None and decode.due(layer.steps + 1):
            _evict(decode, layer, decode.counts(layer.totals), later.candidates(i, layer))


def after_prompt(decode: DecodeCachePruner | None, forward: Forward, later: LaterTokens) -> None:
    """At the end of the prefill: the vision entries of least score leave, where the pruner says so."""
    if decode is None or not decode.after_prefill or forward.cache is None:
        return
    depth = len(later.spans)
    layers = forward.cache.layers[:depth]
    unread = [i for i in range(depth) if i not in forward.readings]
    if unread:
        raise MustDropError(
            f"decoder layers {unread} ran without their attention being read: their attention modules do not ask their "
            "config which function to use."
        )
    settle(decode, forward, later)
    count = decode.counts(layers[0].totals).to(HOST)
    budgets = [count] * depth
    entries = _entries(forward, later, range(depth))
    if decode.scorer.by_layer:
        seen = {key: own.candidates.sum(1) for key, own in {id(own): own for own in entries}.items()}
        held = torch.stack([seen[id(own)] for own in entries])
        mass = [read.mass for _, read in sorted(forward.readings.items()) if read.mass is not None]
        budgets = list(answers.budgets(decode.scorer, _on_the_host(mass), count, held))
    distinct = {id(own): own for own in entries}.values()
    everything = torch.stack([own.vision.sum(1) <= count for own in distinct]).all(0)
    if type(decode).__call__ is DecodeCachePruner.__call__:
        cache_cuts.evict(decode, layers, entries, budgets, everything)
    else:  # a rule of somebody's own
        for layer, own, budget in zip(layers, entries, budgets, strict=True):
            _evict(decode, layer, budget, own.candidates, everything)
    for layer in layers:
        layer.attended = layer.queries = None  # nothing is read any more


def _entries(forward: Forward, later: LaterTokens, which: Iterable[int]) -> list[CacheEntries]:
    """What each of some layers holds; found once in a pass for those that hold the same."""
    out = []
    for i in which:
        layer = forward.cache.layers[i]
        held = layer.positions, layer.vision
        key = ("entries", *map(id, held), layer.slots, later.spans[i])
        if key not in forward.memo:
            positions, vision = layer.slot_positions(), layer.slot_vision()
            assert positions is not None, "a layer without entries"
            assert vision is not None, "a layer without entries"
            parts = positions, vision, later.seen_of(i, vision, positions)
            # holding what describes them keeps their ids from being used again
            forward.memo[key] = held, CacheEntries(*(on(part, HOST) for part in parts))
        out.append(forward.memo[key][1])
    return out


def _on_the_host(values: list[Tensor]) -> Tensor:
    """(L, B) of (B,) per layer, in one copy per device."""
    devices: dict[torch.device, list[int]] = {}
    for i, value in enumerate(values):
        devices.setdefault(value.device, []).append(i)
    out: dict[int, Tensor] = {}
    for some in devices.values():
        out |= dict(zip(some, torch.stack([values[i] for i in some]).to(HOST).unbind(), strict=True))
    return torch.stack([out[i] for i in range(len(values))]) if len(devices) > 1 else torch.stack([*out.values()])


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


def _sums(asked: AttentionCall, rows: Tensor) -> Received:
    """Sum over query rows (B, R), without making the rows where there are several."""
    arguments = asked.arguments(rows)
    one = rows.shape[1] == 1
    given = (kernels.row_probabilities if one else kernels.text_statistics)(*arguments)[:, 0]
    return Received(asked.over_heads(given), _seeing(rows, arguments[3]))


def _seeing(rows: Tensor, visible: Tensor) -> Tensor:
    """(B, K) float32, how many of the rows see each key."""
    return (visible & (rows != PAD)[..., None]).sum(1, dtype=torch.float32)
