"""Whether two passes of a prompt, or two answers, left the same: logits, cache entries and their positions, trace."""

from __future__ import annotations

from typing import Any

import torch

import mustdrop


def left(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What one pass of a patched model leaves."""
    with torch.no_grad():
        out = model(**inputs)
    return of_cache(out.past_key_values) | {"logits": out.logits, **of_trace(model)}


def of_cache(cache: Any) -> dict[str, Any]:
    """Entries of each layer, as far as they are filled, and the positions that they came from."""
    held: dict[str, Any] = {}
    for i, layer in enumerate(cache.layers):
        if layer.keys is None:
            continue
        n = layer.slots
        held[f"keys {i}"], held[f"values {i}"] = layer.keys[:, :, :n].clone(), layer.values[:, :, :n].clone()
        held[f"positions {i}"] = layer.slot_positions()
        held[f"length {i}"] = int(layer.get_seq_length())
    return held


def of_trace(model: Any) -> dict[str, Any]:
    """What the trace says."""
    trace = mustdrop.trace(model)
    rows = range(len(trace.total))
    kept = {f"kept {i} {row}": trace.kept(i, row) for i in range(len(trace.tokens) + 1) for row in rows}
    told = {
        name: getattr(trace, name) for name in ("tokens", "kv_lengths", "kv_vision", "flops", "kv_bytes", "kernels")
    }
    return kept | told


def differences(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.0) -> list[str]:
    """The names of what is not the same."""
    assert a.keys() == b.keys()
    return [name for name in a if not _same(a[name], b[name], tolerance)]


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return bool(a == b)
    if a.shape != b.shape:
        return False
    exact = tolerance == 0 or not a.is_floating_point()
    return torch.equal(a, b) if exact else bool((a - b).abs().max() <= tolerance)
