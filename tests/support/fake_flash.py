"""CPU stand-ins for the two flash-attn kernels, so that transformers' own FlashAttention-2 glue runs without a GPU.

Only the kernels are replaced: unpadding, packing detection and the 2-D masks are the library's real code.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers.modeling_flash_attention_utils as glue
from torch import Tensor, nn

NAME = "flash_attention_2"
calls: Counter[str] = Counter()


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, window: tuple[int, int]) -> Tensor:
    """q (Sq, H, D), k and v (Sk, G, D) -> (Sq, H, D); causal masks are aligned bottom right (>= 2.1).

    In float64, as :func:`exact_sdpa` is: the two add up in another order, which must not show.
    """
    dtype, q, k, v = q.dtype, q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    query = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])[None]
    seen = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    if causal:
        seen &= key <= query
    if window[0] >= 0:
        seen &= key >= query - window[0]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, v).to(dtype)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Equal lengths: (B, S, H, D)."""
    calls["fixed"] += 1
    rows = [_attend(*row, causal, softmax_scale, window_size) for row in zip(q, k, v, strict=True)]
    return torch.stack(rows)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:
    """Packed sequences: (sum of lengths, H, D)."""
    calls["varlen"] += 1
    out = torch.zeros_like(q)
    ends = list(zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True))
    for (q0, k0), (q1, k1) in itertools.pairwise(ends):
        out[q0:q1] = _attend(q[q0:q1], k[k0:k1], v[k0:k1], causal, softmax_scale, window_size)
    return out


@contextlib.contextmanager
def exact_sdpa(exact: bool = True) -> Iterator[None]:
    """While it lasts, torch's own attention computes in float64: what the stand-ins are compared with."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def upcast(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.double()
        return plain(q.double(), k.double(), v.double(), attn_mask=attn_mask, **kwargs).to(q.dtype)

    with pytest.MonkeyPatch.context() as patch:
        if exact:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", upcast)
        yield


def install(monkeypatch: Any) -> None:
    """Put the stand-ins where the glue keeps its kernels; ``monkeypatch`` takes them out after the test."""
    values = {
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_pad_fn": glue._pad_input,
        "_unpad_fn": glue._unpad_input,
        "_process_flash_kwargs_fn": glue._lazy_define_process_function(flash_attn_varlen_func),
        "_flash_with_kvcache_fn": None,
        "_process_with_kvcache_kwargs_fn": dict,
        "_loaded_implementation": NAME,
    }
    for name, value in values.items():
        if hasattr(glue, name):
            monkeypatch.setattr(glue, name, value)
    calls.clear()


def use(model: nn.Module) -> Any:
    """Switch every config of the model to FlashAttention 2 without asking whether the package is there."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation_internal = NAME
    return model
