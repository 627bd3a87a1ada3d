"""Readable PyTorch references. Only the query rows that are needed meet the keys; nothing is queries x keys in size."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

# Heads x rows x keys that may exist at once, in elements: keeps the peak small when a prompt has many text tokens.
_CHUNK = 1 << 25


@torch.no_grad()  # scores decide, they are not part of what is learned
def row_probabilities(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(q k^T) of a few query rows, averaged over heads.

    Args:
        q: (B, H, S, D) queries after the rotary embedding.
        k: (B, G, K, D) keys after the rotary embedding; H is a multiple of G.
        rows: (B, R) long, query rows; -1 is padding and gives a row of zeros.
        visible: (B, R, K) bool, keys that each row sees.
        scaling: factor on the logits.
        bias: (B or 1, 1 or H, R, K) added to the logits (an additive mask that is not only visible / hidden).
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma.

    Returns:
        (B, R, K) float32.
    """
    groups = k.shape[1]
    index = rows.clamp(min=0)
    keys = rearrange(k.float(), "b g k d -> b g d k")
    step = max(1, _CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    out = []
    for start in range(0, rows.shape[1], step):
        part = index[:, start : start + step]
        query = q.gather(2, part[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])).float()
        query = rearrange(query, "b (g h) r d -> b g (h r) d", g=groups)
        logits = rearrange(query @ keys, "b g (h r) k -> b (g h) r k", r=part.shape[1]) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[:, :, start : start + step].float()
        logits = logits.masked_fill(~visible[:, None, start : start + step], -torch.inf)
        out.append(logits.softmax(-1).mean(1))
    probability = torch.cat(out, 1) if out else q.new_zeros(q.shape[0], 0, k.shape[2], dtype=torch.float32)
    return probability.nan_to_num(0.0).masked_fill((rows < 0)[..., None], 0.0)


@torch.no_grad()
def received_attention(q: Tensor, k: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Mean attention that each key receives, over heads and valid queries: the importance where an encoder has no CLS.

    Args:
        q: (B, H, S, D).
        k: (B, H, S, D).
        visible: (B, S) bool, tokens that are not padding.
        scaling: factor on the logits.

    Returns:
        (B, S) float32, 0 on padding.
    """
    batch, heads, length, _ = q.shape
    step = max(1, _CHUNK // max(1, batch * heads * length))
    total = q.new_zeros(batch, length, dtype=torch.float32)
    keys = rearrange(k.float(), "b h s d -> b h d s")
    for start in range(0, length, step):
        logits = (q[:, :, start : start + step].float() @ keys) * scaling
        logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
        probability = logits.softmax(-1).mean(1)
        total += (probability * visible[:, start : start + step, None]).sum(1)
    return total / visible.sum(1, keepdim=True).clamp(min=1)
