"""Attention statistics, readable: only the query rows that are needed meet the keys, chunk by chunk.

Nothing is queries x keys in size, on any path, and nothing has more elements than the inputs together, or than 256 KiB
hold. The Triton kernels beside it have the same signatures.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.kernels.operation import operation
from mustdrop.kernels.reference_tokens import FEW, take

# Heads x rows x keys that may exist at once, in elements: keeps the peak small when a prompt has many text tokens.
_CHUNK = 1 << 25
# The same where a CPU makes them: what is read again at once should still be in the cache of a core.
_CACHED = 1 << 19


def _rows_shape(q: Tensor, k: Tensor, rows: Tensor, visible: Tensor, scaling: float, *rest: object) -> Tensor:
    return q.new_empty(rows.shape[0], rows.shape[1], k.shape[2] - _first(rest), dtype=torch.float32)


def _statistics_shape(q: Tensor, k: Tensor, rows: Tensor, visible: Tensor, scaling: float, *rest: object) -> Tensor:
    return q.new_empty(rows.shape[0], 2, k.shape[2] - _first(rest), dtype=torch.float32)


def _sums_shape(q: Tensor, k: Tensor, rows: Tensor, visible: Tensor, scaling: float, *rest: object) -> Tensor:
    parts = head_parts(k.shape[1])
    return q.new_empty(rows.shape[0], parts, k.shape[2] - _first(rest), dtype=torch.float32)


def head_parts(groups: int) -> int:
    """How many parts `text_sums` has for so many key heads: the most that divide them, up to 16."""
    return max(parts for parts in range(1, min(groups, 16) + 1) if groups % parts == 0)


def _first(rest: tuple[object, ...]) -> int:
    return rest[2] if len(rest) > 2 else 0  # type: ignore[return-value]


def _scores_shape(q: Tensor, k: Tensor, *rest: object) -> Tensor:
    return q.new_empty(k.shape[0], k.shape[2], dtype=torch.float32)


@operation(_rows_shape, "attention:row_probabilities", 3)
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
    parts = [part for _, part in _rows(q, k, rows, visible, scaling, bias, softcap, first)]
    return torch.cat(parts, 1) if parts else _empty(q, k, first).unsqueeze(1)[:, :0]


@operation(_statistics_shape, "attention:text_statistics", 3)
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
        q: (B, H, Q, D) queries, as of `row_probabilities`.
        k: (B, G, K, D) keys.
        rows: the query rows that are read, as of `row_probabilities`.
        visible: which keys each of them sees, as of `row_probabilities`.
        scaling: factor of the products of queries and keys.
        bias: what is added to these, or None.
        softcap: bound of tanh-capped products, or None.
        first: the first key that is asked for; those before it count in the denominator alone.

    Returns:
        (B, 2, K - first) float32: sum and maximum per key; zero where there are no rows.
    """
    total, peak = _empty(q, k, first), _empty(q, k, first)
    for start, part in _rows(q, k, rows, visible, scaling, bias, softcap, first):
        if start == 0:
            total, peak = part.sum(1), part.amax(1)
        else:
            total, peak = total + part.sum(1), torch.maximum(peak, part.amax(1))
    return torch.stack([total, peak], 1)


@operation(_sums_shape, "attention:text_sums", 2)
def text_sums(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
    first: int = 0,
) -> Tensor:
    """Sum over query rows of what `row_probabilities` gives, in parts that add up to it: a launch less per layer.

    Args:
        q: (B, H, Q, D) queries, as of `row_probabilities`.
        k: (B, G, K, D) keys.
        rows: the query rows that are read, as of `row_probabilities`.
        visible: which keys each of them sees, as of `row_probabilities`.
        scaling: factor of the products of queries and keys.
        bias: what is added to these, or None.
        softcap: bound of tanh-capped products, or None.
        first: the first key that is asked for; those before it count in the denominator alone.

    Returns:
        (B, P, K - first) float32. Part p is what the p-th of P equal shares of the heads adds to the mean over all
        heads; P is the largest number up to 16 that divides the key heads.
    """
    parts = head_parts(k.shape[1])
    total = q.new_zeros(q.shape[0], parts, k.shape[2] - first, dtype=torch.float32)
    for _, hidden, part in _heads(q, k, rows, visible, scaling, bias, softcap, first):
        seen = part.nan_to_num(0.0).masked_fill(hidden[:, None], 0.0)
        total += rearrange(seen, "b (p h) r k -> b p h r k", p=parts).sum((2, 3))
    return total / q.shape[1]


@operation(_scores_shape, "decode:key_scores", 2)
def key_scores(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
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
    only = torch.zeros(q.shape[0], 1, dtype=torch.long, device=q.device)
    bias = None if bias is None else bias[:, :, None]
    return row_probabilities(q[:, :, None], k, only, visible[:, None], scaling, bias, softcap)[:, 0]


@operation(_scores_shape, "attention:received_attention", 3)
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
    queries = rearrange(q, "b h s d -> (b h) s d")
    keys = rearrange(k.float(), "b h s d -> (b h) d s").contiguous()
    valid = visible.repeat_interleave(heads, 0)
    whole = visible.device.type == "cpu" and bool(visible.all())  # elsewhere the host would wait for the answer
    received = q.new_zeros(batch * heads, length, dtype=torch.float32)
    for some, rows in _tiles(batch * heads, length, q):
        logits = (queries[some, rows].float() * scaling) @ keys[some]
        if not whole:
            logits = logits.masked_fill_(~valid[some, None], -torch.inf)
        counts = valid[some, None, rows].float()
        received[some] += (counts @ logits.softmax(-1))[:, 0]  # a sum that reads each number once
    total = received.view(batch, heads, length).sum(1)
    return total / (heads * visible.sum(1, keepdim=True).clamp(min=1))


def _tiles(heads: int, length: int, q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Heads and query rows that may meet all keys at once; on a CPU, where their products stay in its cache."""
    most = _CACHED if q.device.type == "cpu" else _CHUNK
    most = min(most, 2 * q.numel())
    rows = max(1, min(length, most // max(1, length)))
    some = max(1, most // max(1, rows * length))
    for head in range(0, heads, some):
        for row in range(0, length, rows):
            yield slice(head, head + some), slice(row, row + rows)


def _rows(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None,
    softcap: float | None,
    first: int,
) -> Iterator[tuple[int, Tensor]]:
    """Head-mean probabilities of some query rows at a time: (number of the first, (B, some, K - first) float32)."""
    for start, hidden, part in _heads(q, k, rows, visible, scaling, bias, softcap, first):
        yield start, part.mean(1).nan_to_num_(0.0).masked_fill_(hidden, 0.0)


def _heads(
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    visible: Tensor,
    scaling: float,
    bias: Tensor | None,
    softcap: float | None,
    first: int,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number of the first of some rows, which of them are padding, (B, some, 1), and (B, H, some, K - first).

    Rows that see nothing hold NaN.
    """
    (batch, heads, _, width), (_, groups, length, _) = q.shape, k.shape
    keys = k.float().mT
    step = _at_once(batch * heads * length, q, k)
    for start in range(0, rows.shape[1], step):
        part = rows[:, start : start + step]
        query = take(q, part, 2).float()
        # queries that share a key head meet its keys at once
        logits = (query.view(batch, groups, -1, width) @ keys).view(batch, heads, -1, length).mul_(scaling)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[:, :, start : start + step].float()
        logits = logits.masked_fill_(~visible[:, None, start : start + step], -torch.inf)
        yield start, (part < 0)[..., None], logits.softmax(-1)[..., first:]


def _at_once(products: int, *inputs: Tensor) -> int:
    """Query rows that may meet the keys at once, each of which makes so many products."""
    return max(1, min(_CHUNK, max(FEW, sum(x.numel() for x in inputs))) // max(1, products))


def _empty(q: Tensor, k: Tensor, first: int) -> Tensor:
    return q.new_zeros(q.shape[0], k.shape[2] - first, dtype=torch.float32)
