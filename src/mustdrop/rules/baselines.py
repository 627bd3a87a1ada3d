"""Scores of the two baselines that look at nothing: evenly spread tokens, and random ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mustdrop.constants import constant


def uniform_scores(n: int, device: torch.device | None = None) -> Tensor:
    """Scores under which the best k tokens, for every k, are spread evenly over the sequence (van der Corput order).

    Args:
        n: tokens.
        device: where to put the result.

    Returns:
        (n,) float64.
    """
    where = torch.device("cpu") if device is None else device
    return constant(("van der Corput", n), where, lambda: torch.from_numpy(_van_der_corput(n)).to(where))


def _van_der_corput(n: int) -> np.ndarray:
    index, score, half = np.arange(n), np.zeros(n), 0.5
    while index.any():
        score += half * (index % 2)
        index, half = index // 2, half / 2
    return -score


def random_scores(n: int, seed: int, device: torch.device | None = None) -> Tensor:
    """(n,) float64 scores in [0, 1). They depend on (n, seed) alone, so a row of a batch gets what it gets alone."""
    where = torch.device("cpu") if device is None else device
    return constant(("random", n, seed), where, lambda: _drawn(n, seed).to(where))


def _drawn(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator, dtype=torch.float64, device="cpu")
