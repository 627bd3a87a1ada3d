"""Gates between 0 and 1 that add up to a budget: what stands for dropping while a scorer is trained.

A vision token with gate g has log g added to its attention logits, in every layer and for every query. At 1 it is as it
was, at 0 it is hidden, which equals dropping it (the masked reference of docs/conformance.md); in between, what scores
it follows from the answers by gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mustdrop.methods.learned import choice

FLOOR = -30.0  # log of the smallest soft gate: its gradient is that of a token which is as good as gone
_HALVINGS = 40


def soft_gates(
    score: Tensor, count: int, temperature: float, noise: Tensor | None = None, slope: float | None = None
) -> Tensor:
    """(N,) log gates of one picture: sigmoid((score - threshold) / temperature), which add up to `count`.

    The threshold is part of the gradient: to raise one score lowers the gates of the others.

    Args:
        score: (N,) of its features.
        count: how many may stay, 0 < count < N.
        temperature: the lower, the closer gates are to 0 and 1.
        noise: (N,) added to the scores, so that features near the threshold are tried on both sides of it.
        slope: temperature of the gates that gradients are taken of, in place of `temperature`: nearly hard gates have
            none but at the threshold (a straight-through estimate).
    """
    noisy = score if noise is None else score + noise
    with torch.no_grad():
        threshold = _threshold(noisy, count, temperature)
        value = logsigmoid((noisy - threshold) / temperature).clamp(min=FLOOR)
        gate = torch.sigmoid((noisy - threshold) / (slope or temperature))
        weight = gate * (1 - gate)
        weight = weight / weight.sum().clamp(min=1e-12)
    moves = (weight * noisy).sum()
    moving = logsigmoid((noisy - threshold - moves + moves.detach()) / (slope or temperature))
    return value + moving - moving.detach()


def _threshold(score: Tensor, count: int, temperature: float) -> Tensor:
    """() the threshold at which the gates add up to `count`."""
    reach = 20 * temperature
    low, high = score.min() - reach, score.max() + reach
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        many = torch.sigmoid((score - middle) / temperature).sum() > count
        low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    return (low + high) / 2


def hard_gates(score: Tensor, count: int, values: Tensor | None = None, coverage: float = 0.0) -> Tensor:
    """(N,) log gates of one picture: 0 for the features that the method `learned` keeps, minus infinity for the others.

    Args:
        score: (N,) of its features.
        count: how many stay.
        values: (N, C) the features, where coverage counts.
        coverage: see `mustdrop.methods.learned.Learned`.
    """
    features = score[:, None] if values is None else values
    kept = choice(features[None], score[None], count, coverage).keep[0]
    return torch.full_like(score, -torch.inf).index_fill(0, kept, 0.0)


def counts(sizes: Sequence[int], keep: float) -> list[int]:
    """How many features of each picture of a prompt stay: a share of it, at least one."""
    return [max(1, min(size, int(keep * size + 1e-6))) for size in sizes]


def gated(mask: Tensor | None, log_gate: Tensor, hidden: Tensor) -> Tensor:
    """The attention mask of a decoder layer with log gates in its columns, additive.

    Args:
        mask: what transformers passed: None (causal), or (B or 1, 1, queries, keys), bool or additive.
        log_gate: (keys,), 0 where nothing changes.
        hidden: (B, queries, C), input of the layer: type and device of the mask.
    """
    dtype, length = hidden.dtype, log_gate.shape[0]
    lowest = torch.finfo(dtype).min
    if mask is None:
        places = torch.arange(length, dtype=torch.long, device=hidden.device)
        mask = (places <= places[:, None])[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
    # never below the lowest number: a query of which every key is hidden would get NaN
    return (mask[..., :length] + log_gate.to(dtype)).clamp(min=lowest)
