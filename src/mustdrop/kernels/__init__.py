"""The operations on many tokens: attention statistics, window similarity, merging, matching, gathering, compaction.

Each has a readable PyTorch reference and a Triton kernel of the same signature. `dispatch` says which of them runs;
every function here takes tensors of any device. Scores carry no gradient. Where a gradient must flow through gathering
or merging, the reference runs, whose steps autograd knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.kernels import ops, reference_tokens
from mustdrop.kernels.dispatch import Choice, chosen, differentiable, implementation, use_kernels

__all__ = [
    "Choice",
    "best_match",
    "chosen",
    "compact",
    "cut_mask",
    "gather_rows",
    "implementation",
    "key_scores",
    "merge_tokens",
    "received_attention",
    "row_probabilities",
    "text_statistics",
    "use_kernels",
    "window_similarity",
]


@torch.no_grad()  # scores decide, they are not part of what is learned
def row_probabilities(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    first: int = 0,
) -> Tensor:
    """softmax(q k^T) of a few query rows, averaged over heads.

    Args:
        q: (B, H, S, D) queries after the rotary embedding.
        k: (B, G, K, D) keys after the rotary embedding; H is a multiple of G.
        rows: (B, R) long, query rows; -1 is padding and gives a row of zeros.
        visible: (B, R, K) bool, keys that each row sees. The softmax runs over all of them.
        scaling: factor on the logits.
        bias: (B or 1, 1 or H, R, K) added to the logits (an additive mask that is not only visible / hidden).
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma.
        first: keys before this one count in the softmax, but are left out of the result.

    Returns:
        (B, R, K - first) float32. A row that sees nothing is zero.
    """
    return ops.row_probabilities(q, k, rows, visible, scaling, bias, softcap, first)  # type: ignore[no-any-return]


@torch.no_grad()
def text_statistics(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    first: int = 0,
) -> Tensor:
    """Sum and maximum over query rows of what `row_probabilities` gives, without making those rows.

    Source: the global and the individual attention of MustDrop (arXiv 2411.10803).

    Args:
        q: and all others: see `row_probabilities`.
        k: likewise.
        rows: likewise.
        visible: likewise.
        scaling: likewise.
        bias: likewise.
        softcap: likewise.
        first: likewise.

    Returns:
        (B, 2, K - first) float32: sum and maximum per key; zero where there are no rows.
    """
    return ops.text_statistics(q, k, rows, visible, scaling, bias, softcap, first)  # type: ignore[no-any-return]


@torch.no_grad()
def key_scores(
    q: Tensor, k: Tensor, visible: Tensor, scaling: float, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Head-mean probability that one query gives to each key: the score of a decode step.

    Args:
        q: (B, H, D), one query per sequence.
        k: (B, G, K, D), H a multiple of G.
        visible: (B, K) bool.
        scaling: factor on the logits.
        bias: (B or 1, 1 or H, K) added to the logits.
        softcap: as in `row_probabilities`.

    Returns:
        (B, K) float32.
    """
    return ops.key_scores(q, k, visible, scaling, bias, softcap)  # type: ignore[no-any-return]


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
    return ops.received_attention(q, k, visible, scaling)  # type: ignore[no-any-return]


@torch.no_grad()
def window_similarity(x: Tensor, index: Tensor) -> Tensor:
    """Mean pairwise cosine similarity of the tokens of each window.

    The closed form (|sum of unit vectors|^2 - sum of their squared norms) / (n (n - 1)) needs no pairwise products, so
    the features are read once.

    Args:
        x: (B, N, C).
        index: (W, n) long, tokens of each window, n at least 2.

    Returns:
        (B, W) float32.
    """
    return ops.window_similarity(x, index)  # type: ignore[no-any-return]


def merge_tokens(x: Tensor, slot: Tensor, slots: int, weight: Tensor | None = None) -> Tensor:
    """(Weighted) means of the tokens that share a slot. A slot of one token is a copy, one without tokens is zero.

    Args:
        x: (B, N, C).
        slot: (B, N) long, slot of each token, -1 where it is gone.
        slots: M, how many there are.
        weight: (B, N), for example how many patches a token stands for; None weighs all alike.

    Returns:
        (B, M, C) of the type of `x`; sums are made in float32.
    """
    if differentiable(x, weight):
        return reference_tokens.merge_tokens(x, slot, slots, weight)
    return ops.merge_tokens(x, slot, slots, weight)  # type: ignore[no-any-return]


@torch.no_grad()
def best_match(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each source its most similar destination, without the matrix of similarities.

    Source: bipartite soft matching of ToMe (arXiv 2210.09461).

    Args:
        a: (B, n, C) sources.
        b: (B, m, C) destinations, m at least 1.

    Returns:
        (cosine, index): (B, n) float32 and (B, n) long. Among equals, any.
    """
    best: tuple[Tensor, Tensor] = ops.best_match(a, b)
    return best


def gather_rows(tensors: list[Tensor], index: Tensor, zero: bool = False) -> list[Tensor]:
    """The same rows of several tensors, with one launch for up to four of them.

    Args:
        tensors: each (B or 1, N, ...), of any type: hidden states, rotary tables, positions.
        index: (B, M) long, rows; -1 is padding.
        zero: padding becomes zero; otherwise it reads row 0.

    Returns:
        New tensors, each (B, M, ...).
    """
    if differentiable(*tensors):
        return reference_tokens.gather_rows(tensors, index, zero)
    return ops.gather_rows(tensors, index, zero)  # type: ignore[no-any-return]


def cut_mask(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Rows and columns of a mask in one step.

    Args:
        mask: (B or 1, 1 or H, Q, K) of any type.
        rows: (B, n) long, -1 reads row 0.
        columns: (B, k) long, -1 reads column 0.

    Returns:
        (B, 1 or H, n, k), new.
    """
    if differentiable(mask):
        return reference_tokens.cut_mask(mask, rows, columns)
    return ops.cut_mask(mask, rows, columns)  # type: ignore[no-any-return]


def compact(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
    """The same entries of the keys and values of many cache layers, in one launch per shape.

    Each result has storage of its own: what is left out is freed as soon as the old tensors are.

    Args:
        tensors: each (B, G, N, D); G, N and D may differ.
        index: (B, M) long, entries that stay; -1 is padding and reads entry 0.

    Returns:
        New tensors, each (B, G, M, D).
    """
    if differentiable(*tensors):
        return reference_tokens.compact(tensors, index)
    return ops.compact(tensors, index)  # type: ignore[no-any-return]
