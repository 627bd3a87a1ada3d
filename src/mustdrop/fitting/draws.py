"""Random numbers of a fit: each is told by the seed, a purpose and a number, and by nothing that went before."""

from __future__ import annotations

import torch
from torch import Tensor


class Draw:
    """Random numbers of one purpose and one number."""

    def __init__(self, seed: int, purpose: int, number: int) -> None:
        self.generator = torch.Generator().manual_seed((seed * 8 + purpose) * 10_000_019 + number)

    def permutation(self, number: int) -> list[int]:
        """The numbers below `number` in an order."""
        return torch.randperm(number, generator=self.generator, dtype=torch.long, device="cpu").tolist()

    def between(self, low: float, high: float) -> float:
        """A number between two, all alike."""
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64, device="cpu"))

    def logistic(self, number: int) -> Tensor:
        """(number,) float32 of the logistic distribution: added to a score, they make its gate a coin."""
        drawn = torch.rand(number, generator=self.generator, dtype=torch.float32, device="cpu")
        return torch.logit(drawn.clamp(1e-6, 1 - 1e-6))
