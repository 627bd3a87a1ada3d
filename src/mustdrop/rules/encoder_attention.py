"""Scores of vision tokens from the encoder's own attention, and the two baselines that need no attention."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_scores(n: int, device: torch.device | None = None) -> Tensor:
    """Scores under which the best k tokens, for every k, are spread evenly over the sequence (van der Corput order).

    Args:
        n: tokens.
        device: where to put the result.

    Returns:
        (n,) float64.
    """
    index = torch.arange(n, dtype=torch.long, device=device)
    score = torch.zeros(n, dtype=torch.float64, device=device)
    half = 0.5
    while bool(index.any()):
        score += half * (index % 2)
        index, half = index // 2, half / 2
    return -score


def random_scores(n: int, seed: int, device: torch.device | None = None) -> Tensor:
    """(n,) float64 scores in [0, 1). They depend on (n, seed) alone, so a row of a batch gets what it gets alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator, dtype=torch.float64, device="cpu").to(device)
