"""Flex attention without a compiler, so that transformers' own glue around it runs on any machine.

The kernel makes the whole matrix of scores, and asks the mask's function about all of it at once; torch's own reference
asks under four nested `vmap`s, which takes long (a test compares the two). The block masks and the glue that hands them
on are the library's real code.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
import torch.nn.attention.flex_attention as kernel
import transformers.integrations.flex_attention as glue
import transformers.masking_utils as masking
from torch import Tensor, nn

from mustdrop.adapters import find

NAME = "flex_attention"
calls: Counter[str] = Counter()


def _attend(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: Any) -> Any:
    mask = kwargs.get("block_mask")
    calls["without a mask" if mask is None else "masked"] += 1
    return kernel.flex_attention(query, key, value, **kwargs) if mask is None else attend(query, key, value, **kwargs)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any, block_mask: Any, scale: float | None, **kwargs: Any
) -> Tensor:
    """What `flex_attention` returns for (B, H, n, D) queries and (B, G, K, D) keys and values."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    sizes = (*query.shape[:3], key.shape[2])
    b, h, q, k = (torch.arange(n, device=query.device).view(*[1] * i, -1, *[1] * (3 - i)) for i, n in enumerate(sizes))
    scores = score_mod(query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale), b, h, q, k)
    seen = block_mask.mask_mod(b, h, q, k).expand(sizes)
    weights = scores.float().masked_fill(~seen, -torch.inf).softmax(-1)
    return weights.masked_fill(~seen.any(-1, keepdim=True), 0).to(value.dtype) @ value


def install(monkeypatch: Any) -> None:
    """Leave the compiler out of the kernel and of the making of masks; ``monkeypatch`` undoes it after the test."""
    monkeypatch.setattr(kernel, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(glue, "compile_friendly_flex_attention", _attend)
    plain = masking.create_block_mask

    @functools.wraps(plain)
    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **{**kwargs, "_compile": False})

    monkeypatch.setattr(masking, "create_block_mask", uncompiled)
    calls.clear()


def use(model: Any) -> Any:
    """Switch a model to flex attention in the way that transformers offers: all of it, or else its text model.

    Raises:
        ValueError: transformers does not support it in the text model.
    """
    try:
        model.set_attn_implementation(NAME)
    except ValueError:
        text = find(model).text(model).config
        (key,) = (key for key in model.config.sub_configs if getattr(model.config, key) is text)
        model.set_attn_implementation({key: NAME})
    return model


def force(model: nn.Module) -> Any:
    """Switch every config of a model without asking whether it can."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation_internal = NAME
    return model
