"""Smoothing of scores along the sequence."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def neighbour_mean(score: Tensor, candidates: Tensor, kernel: int) -> Tensor:
    """Sliding average over the candidates among the `kernel` entries around each one.

    Source: the pooling of SnapKV (arXiv 2404.14469). What is no candidate, or beyond the ends, does not count.

    Args:
        score: (B, n) float32.
        candidates: (B, n) bool.
        kernel: width of the window; for an even one the odd entry comes before.

    Returns:
        (B, n) float32, 0 where there is no candidate in the window.
    """
    if kernel == 1:
        return score * candidates
    pad = (kernel // 2, (kernel - 1) // 2)
    weight = candidates.to(score.dtype)
    total = F.avg_pool1d(F.pad(score * weight, pad)[:, None], kernel, stride=1)[:, 0]
    seen = F.avg_pool1d(F.pad(weight, pad)[:, None], kernel, stride=1)[:, 0]
    # a window holds a whole number of candidates, so below half of one means none
    return (total / seen.clamp(min=0.5 / kernel)).masked_fill(seen * kernel < 0.5, 0.0)
