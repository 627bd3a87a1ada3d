"""What a straight pass has left, written down in the caller's cache and for the trace. Nothing waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mustdrop import kv
from mustdrop.indices import HOST, PAD, Sent
from mustdrop.kv import Held
from mustdrop.runtime.language.straight_pass import Straight
from mustdrop.runtime.language.vision_tokens import VisionTokens
from mustdrop.runtime.state import Call, Forward


def land(straight: Straight, forward: Forward, media: VisionTokens, inner: Any, call: Call | None) -> None:
    """A straight pass over the cache `inner` has ended: the pass and the caller's cache know what came of it."""
    rows = _rows(straight)
    forward.rows = rows[-1]
    forward.padded = bool(straight.choices) and straight.choices[-1].padded
    if forward.cache is not None:
        _fill(straight, forward, media, inner, rows)
    if forward.record is not None:
        _record(straight, forward, media, rows)
    if call is not None and call.labels and forward.rows is not None:
        target = forward.rows.masked_fill(forward.rows == PAD, forward.length)
        here = torch.zeros(forward.batch, forward.length + 1, dtype=torch.bool, device=target.device)
        call.out_of_the_loss(~here.scatter(1, target, True)[:, : forward.length])


def _after(straight: Straight, i: int) -> int:
    """How many choices rows have passed in decoder layer `i`."""
    return sum(choice.layer <= i for choice in straight.choices)


def _rows(straight: Straight) -> list[Tensor | None]:
    """Per decoder layer and once more for the end, the chunk index of each row; None while all are there."""
    known = [None, *(rows for rows, _, _ in straight.history)]
    return [known[_after(straight, i)] for i in range(straight.depth + 1)]


def _fill(straight: Straight, forward: Forward, media: VisionTokens, inner: Any, rows: list[Tensor | None]) -> None:
    """Hand the entries of the inner cache to the layers of the caller's, with what is known of them."""
    fixed, last = straight.fixed, len(straight.choices)
    totals = torch.tensor(media.totals, dtype=torch.long, device=HOST)
    known = [(fixed.positions, fixed.vision, media.padded, True)] + [
        (there, vision, choice.padded, False)
        for choice, (there, vision, _) in zip(straight.choices, straight.history, strict=True)
    ]
    held: list[tuple[Any, Held]] = []
    layers = forward.cache.layers[: straight.depth]
    for i, (layer, own) in enumerate(zip(layers, inner.layers[: straight.depth], strict=True)):
        stage = _after(straight, i)
        if i >= straight.full:  # it was cut to what the last layer processed
            stage = last
        positions, vision, padded, whole = known[stage]
        held.append((layer, Held(own, positions, vision, padded, whole)))
    kv.hold(held, totals, forward.length)
    if rows[-1] is None:
        for layer in layers:
            layer.forget()


def _record(straight: Straight, forward: Forward, media: VisionTokens, rows: list[Tensor | None]) -> None:
    """For the trace: which rows went through each layer, and what was read of them."""
    record = forward.record
    assert record is not None, "a pass that is not recorded"
    record.rows, record.past = [*rows], [0] * straight.depth
    for choice, (_, _, attention) in zip(straight.choices, straight.history, strict=True):
        if choice.rows is None or attention is None:
            continue
        layer = choice.layer - 1
        record.scored.append((layer, choice.rows.shape[1]))
        plain = attention.shape[1] == 2 and choice.text is None
        record.hear(layer, Sent(attention) if plain else attention, rows[layer])
