"""From the run state of a finished call to its `Trace`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop import kv
from mustdrop.cost import Compared, total
from mustdrop.runtime.rows import PAD, take
from mustdrop.runtime.state import Call, Prefill
from mustdrop.trace import Trace

if TYPE_CHECKING:
    from mustdrop.runtime.core import Runtime


def record(runtime: Runtime, call: Call) -> Trace:
    """The trace of a finished call."""
    prefill = call.prefill
    depth = runtime.depth
    if prefill is None:  # nothing went through the text model
        empty = torch.zeros(1, 1, dtype=torch.bool, device="cpu")
        prefill = Prefill(empty, 0, empty)
    rows: list[Tensor | None] = prefill.rows or [None] * (depth + 1)
    alive = _alive(prefill, rows)
    tokens = torch.tensor([[len(a) for a in layer] for layer in alive[:depth]], dtype=torch.long, device="cpu")
    cache = call.cache
    valid = prefill.valid
    if cache is not None and isinstance(cache.layers[0], kv.PrunedStaticLayer):  # compiled steps count nothing
        call.steps = cache.layers[0].logical - prefill.start - valid.shape[1]
    kv_lengths, held = _entries(cache, prefill, depth, len(alive[0]))
    return Trace(
        method=runtime.method.name,
        total=prefill.vision.sum(1).cpu(),
        tokens=tokens,
        kv_lengths=kv_lengths,
        kv_vision=held,
        flops=_flops(runtime, call, prefill, rows, tokens, kv_lengths),
        kv_bytes=_kv_bytes(cache, depth),
        backend=runtime.implementation,
        kernels=", ".join(sorted(call.kernels)) or "none",
        filters=runtime.filters,
        fit=runtime.adapter.fit(runtime.model),
        media=prefill.media,
        _alive=alive,
        _marks=[row.to("cpu") for row in prefill.marks],
        _heard=prefill.heard,
        _vision=prefill.vision,
    )


def _entries(cache: Any, prefill: Prefill, depth: int, batch: int) -> tuple[Tensor, Tensor]:
    """(L, B) long: entries of each cache layer, and those of this prompt's vision tokens.

    Layers with the same entries share the result.
    """
    if cache is None:
        nothing = torch.zeros(depth, batch, dtype=torch.long, device="cpu")
        return nothing, nothing
    done: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    layers = cache.layers[:depth]
    for layer in layers:
        if layer.layout_key not in done:
            lengths = layer.lengths(prefill.start, prefill.valid)
            done[layer.layout_key] = lengths.cpu(), layer.held(prefill.start, prefill.vision & prefill.valid).cpu()
    lengths, held = zip(*(done[layer.layout_key] for layer in layers), strict=True)
    return torch.stack(lengths), torch.stack(held)


def _alive(prefill: Prefill, rows: list[Tensor | None]) -> list[list[Tensor]]:
    """Per layer and sample, ascending ordinals among the sample's vision tokens.

    Layers that share rows share the result.
    """
    vision = prefill.vision.cpu()
    ordinal = vision.long().cumsum(1) - 1
    everything = [names[seen] for names, seen in zip(ordinal, vision & prefill.valid.cpu(), strict=True)]
    done: dict[int, list[Tensor]] = {}
    out = []
    for row in rows:
        if row is None:
            out.append(everything)
            continue
        if id(row) not in done:
            index = row.cpu()
            real = (index != PAD) & take(vision, index, 1)
            names = take(ordinal, index, 1)
            done[id(row)] = [names[b][real[b]].sort().values for b in range(len(names))]
        out.append(done[id(row)])
    return out


def _kv_bytes(cache: Any, depth: int) -> Compared:
    if cache is None:
        return Compared(0, 0)
    actual = sum(layer.storage_bytes() for layer in cache.layers[:depth])
    unpruned = sum(layer.unpruned_bytes() for layer in cache.layers[:depth])
    return Compared(actual, unpruned)


def _flops(
    runtime: Runtime, call: Call, prefill: Prefill, rows: list[Tensor | None], tokens: Tensor, kv_lengths: Tensor
) -> Compared:
    depth, batch = runtime.depth, prefill.vision.shape[0]
    text = runtime.text_cost
    whole, seen = prefill.valid.sum(1).tolist(), (prefill.vision & prefill.valid).sum(1).tolist()
    counts: dict[int, list[int]] = {}
    for row in rows:
        if row is not None and id(row) not in counts:
            counts[id(row)] = (row != PAD).sum(1).tolist()
    new = [[counts[id(row)][b] if row is not None else whole[b] for row in rows[:depth]] for b in range(batch)]
    past = prefill.past[:depth] or [0] * depth
    start = [prefill.start] * depth
    scoring = sum(text.scoring(i, rows, new[b][i] + past[i]) for b in range(batch) for i, rows in prefill.scored)
    logical = [int(n) for n in (torch.tensor(whole, dtype=torch.long, device="cpu") + prefill.start + call.steps)]
    parts = {
        "vision": _encoder_cost(runtime, call),
        "projector": _projector_cost(runtime, call),
        "scoring": Compared(scoring, 0),
        "prefill": Compared(
            sum(text.prefill(new[b], past, tokens[:, b].tolist()) for b in range(batch)),
            sum(text.prefill([whole[b]] * depth, start, [seen[b]] * depth) for b in range(batch)),
        ),
        "decode_step": Compared(
            sum(text.step(kv_lengths[:, b].tolist()) for b in range(kv_lengths.shape[1])),
            sum(text.step([n] * depth) for n in logical),
        ),
    }
    return total(parts, ("vision", "projector", "scoring", "prefill"))


def _encoder_cost(runtime: Runtime, call: Call) -> Compared:
    """Of every pass through an encoder, merged and as long as it came in."""
    actual = unpruned = 0
    for run in call.encoded:
        if not run.lengths:
            continue
        distinct = {id(length): length for length in run.lengths}
        known = {key: length.tolist() for key, length in distinct.items()}
        lengths = [known[id(length)] for length in run.lengths]
        tower, merged = run.tower, run.merged is not None
        cost = runtime.encoder_cost(tower)
        embedding = cost.embedding * (sum(lengths[0]) - tower.prefix * len(lengths[0]))
        actual += embedding + cost.layers(lengths)
        # before windows merge, every layer sees what the first one sees
        whole = [lengths[0]] * len(lengths) if merged else lengths
        unpruned += embedding + cost.layers(whole)
    return Compared(actual, unpruned)


def _projector_cost(runtime: Runtime, call: Call) -> Compared:
    features = sum(layout.size for rows in call.layouts.values() for row in rows for layout in row)
    flops = runtime.adapter.projector_flops(runtime.model) * features if features else 0
    return Compared(flops, flops)
