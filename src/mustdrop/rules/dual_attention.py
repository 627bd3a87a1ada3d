"""Which vision tokens the text looks at: the dual-attention rule of MustDrop and the rank-adaptive count of SparseVLM.

Source: MustDrop (arXiv 2411.10803), prefilling stage; SparseVLM (arXiv 2410.04417) for the rank rule. All functions
take
`attention`, (B, T, N): softmax probability, averaged over heads, that text token t gives to vision token n. The softmax
runs over everything that t sees, so rows do not add up to 1 over the vision tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.constants import where


def dual_statistics(attention: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Global and individual attention of each vision token.

    Args:
        attention: (B, T, N) head-mean text-to-vision probabilities; rows of padding must be zero.
        alive: (B, N) bool.

    Returns:
        (global, individual), each (B, N) float32: the sum over text tokens as a share of the row's total over the alive
        tokens, and the maximum over text tokens. Both are 0 where a token is not alive.
    """
    probability = attention.float()
    return shares(torch.stack([probability.sum(1), probability.amax(1)], 1), alive)


def shares(statistics: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Global and individual attention from the sum and the maximum over the text tokens.

    Args:
        statistics: (B, 2, N), what `mustdrop.kernels.text_statistics` gives.
        alive: (B, N) bool.

    Returns:
        See `dual_statistics`.
    """
    total, peak = where(alive[:, None], statistics, 0).unbind(1)
    return total / total.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny), peak


def dual_filter(
    statistics: tuple[Tensor, Tensor], alive: Tensor, global_threshold: float, individual_threshold: float
) -> Tensor:
    """Mask (B, N) of tokens that stay: a token goes only if both of its attentions are below their thresholds."""
    share, peak = statistics
    return alive & ~((share < global_threshold) & (peak < individual_threshold))


def dual_score(statistics: tuple[Tensor, Tensor], gamma: float = 1.0, alpha: float = 1.0) -> Tensor:
    """The ranking that `dual_filter` implies, (B, N): max(global / gamma, individual / alpha).

    Lowering both thresholds by a common factor moves a cut through exactly this order, so "keep the best n" and
    "drop below (gamma, alpha) times lambda" are the same family of selections.
    """
    share, peak = statistics
    return torch.maximum(share if gamma == 1 else share / gamma, peak if alpha == 1 else peak / alpha)


def rank_counts(attention: Tensor, alive: Tensor, scale: float, bias: float) -> Tensor:
    """Tokens to keep per row by the rank rule: int(rank(attention) * scale + bias), at least 1, at most alive - 1.

    A row whose attention matrix has full column rank keeps everything (SparseVLM v1).

    Args:
        attention: (B, T, N).
        alive: (B, N) bool.
        scale: tokens kept per unit of rank.
        bias: tokens kept on top.

    Returns:
        (B,) long.
    """
    present = alive.sum(1)
    matrix = attention.float().masked_fill(~alive[:, None], 0)
    # the tolerance of the row alone: padding of a batch must not change its rank
    largest = torch.linalg.matrix_norm(matrix, ord=2)
    rows = (matrix.abs().sum(2) > 0).sum(1)
    tolerance = torch.maximum(rows, present) * torch.finfo(torch.float32).eps * largest
    rank = torch.linalg.matrix_rank(matrix, atol=tolerance, rtol=torch.zeros_like(tolerance))
    count = (rank * scale + bias).long().clamp(min=1).minimum((present - 1).clamp(min=1))
    return torch.where(rank >= present, present, count)
