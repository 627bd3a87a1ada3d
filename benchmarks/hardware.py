"""What the hardware gives: a model's own layers and matrix products on fewer tokens, without mustdrop in the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LlavaForConditionalGeneration

from benchmarks.common import Clock, significant, spread
from mustdrop.compat import cache_name, give_cache
from mustdrop.cost import linear_flops


def bare(model: Any, lengths: Sequence[int], clock: Clock, batch: int = 1) -> float:
    """Seconds of the decoder layers alone, layer i on `lengths[i]` tokens: no scoring, no gathering, no hooks."""
    text = model.model.language_model
    hidden = torch.randn(batch, lengths[0], text.config.hidden_size, device=model.device, dtype=model.dtype)
    position_ids = torch.arange(lengths[0], device=model.device)[None]
    cache = DynamicCache(config=text.config)
    axes = hasattr(text.config, "rope_parameters") and "mrope_section" in text.config.rope_parameters
    rotary = text.rotary_emb(hidden, position_ids.expand(3, 1, -1) if axes else position_ids)
    start = clock()
    for layer, n in zip(text.layers, lengths, strict=True):
        cut = tuple(table[..., :n, :] for table in rotary)
        arguments: dict[str, Any] = {"position_ids": position_ids[:, :n], "position_embeddings": cut, "use_cache": True}
        give_cache(arguments, cache, cache_name(layer))
        hidden = layer(hidden[:, :n], **arguments)
    return clock() - start


def roofline(model: LlavaForConditionalGeneration, lengths: Sequence[int], clock: Clock, times: int) -> list[Any]:
    """The linear layers of the first decoder layers at several token counts: what fewer rows cost the hardware."""
    layers = model.model.language_model.layers[:8]
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    widths = {m.in_features for m in linears}
    flops = sum(linear_flops(layer) for layer in layers)
    rows = []
    for n in lengths:
        inputs = {width: torch.randn(n, width, device=model.device, dtype=model.dtype) for width in widths}
        seconds = []
        for _ in range(times + 1):
            start = clock()
            for linear in linears:
                linear(inputs[linear.in_features])
            seconds.append(clock() - start)
        middle = spread(seconds[1:])["median"]
        rows.append({"tokens": n, "seconds": middle, "gflops": significant(flops * n / middle / 1e9)})
    full = rows[0]["gflops"]
    return [row | {"efficiency": significant(row["gflops"] / full)} for row in rows]
