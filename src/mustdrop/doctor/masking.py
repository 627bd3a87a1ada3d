"""Dropping a token from a layer on must equal hiding it there: the plain model, with a mask per decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import mustdrop
from mustdrop.adapters import find

TOLERANCE = 1e-3  # float32, logits of about 10
KEEP = 200


def difference(model: Any, inputs: Any) -> tuple[float, int]:
    """Largest difference of the last token's logits between the patched and the masked plain model.

    Tokens leave in the prefill stage only: merged features have no counterpart in the plain model.

    Args:
        model: the bundled model, unpatched.
        inputs: of one prompt without padding.

    Returns:
        The difference, and how many vision tokens were gone at the last decoder layer.
    """
    pruner = mustdrop.PrefillPruner(keep=KEEP)
    with mustdrop.patched(model, prefill=pruner):
        dropped = model(**inputs, logits_to_keep=1).logits
        trace = mustdrop.trace(model)
    where = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].cpu()
    hidden = []
    for layer in range(len(trace.tokens)):
        gone = torch.ones(len(where), dtype=torch.bool, device="cpu")
        gone[trace.kept(layer).cpu()] = False
        hidden.append(where[gone])
    with _masked(find(model).decoder_layers(model), hidden):
        masked = model(**inputs, logits_to_keep=1).logits
    return float((dropped - masked).abs().max()), len(hidden[-1])


@contextmanager
def _masked(layers: Any, hidden: list[Tensor]) -> Iterator[None]:
    handles = [
        layer.register_forward_pre_hook(_hide(gone), with_kwargs=True)
        for layer, gone in zip(layers, hidden, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hide(gone: Tensor) -> Callable[..., Any]:
    def hook(module: object, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        states = args[0]
        length = states.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=states.device).tril()
        seen[:, gone.to(states.device)] = False
        seen.fill_diagonal_(True)  # a hidden row may see itself: nobody sees the row
        mask = torch.zeros(seen.shape, dtype=states.dtype, device=states.device)
        kwargs["attention_mask"] = mask.masked_fill(~seen, torch.finfo(states.dtype).min)[None, None]
        return args, kwargs

    return hook
