"""Bipartite soft matching: every other token may join the one that it resembles most (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mustdrop import kernels


def join(metric: Tensor, number: int, protected: int = 0) -> tuple[Tensor, int]:
    """Where each token goes if `number` of them join another one.

    Tokens at even places are sources, those at odd places destinations. The sources whose best match is closest join
    it; what comes out are the other sources, then the destinations, both in their order.

    Args:
        metric: (B, N, D), compared by cosine.
        number: tokens that go, at most (N - protected) // 2 do.
        protected: tokens at the front that neither go nor are merged into; one (CLS) at most.

    Returns:
        (into, slots): (B, N) long, slot of each token, and how many slots there are.
    """
    source, destination = metric[:, ::2], metric[:, 1::2]
    number = min(number, (metric.shape[1] - protected) // 2)
    slots = metric.shape[1] - max(number, 0)
    if number <= 0:
        return torch.arange(slots, dtype=torch.long, device=metric.device).expand(metric.shape[:2]), slots
    similar, best = kernels.best_match(source, destination)
    if protected:
        similar[:, 0] = -torch.inf
    ranked = similar.argsort(dim=1, descending=True, stable=True)
    goes, stays = ranked[:, :number], ranked[:, number:].sort(1).values
    left = stays.shape[1]
    into = metric.new_empty(metric.shape[:2], dtype=torch.long)
    into[:, 1::2] = torch.arange(left, slots, dtype=torch.long, device=metric.device)
    even = torch.empty_like(similar, dtype=torch.long)
    even.scatter_(1, stays, torch.arange(left, dtype=torch.long, device=metric.device).expand_as(stays))
    even.scatter_(1, goes, best.gather(1, goes) + left)
    into[:, ::2] = even
    return into, slots


def amounts(tokens: int, target: int, layers: int) -> list[int]:
    """Tokens that merge in each of `layers`, as evenly as it goes, so that `target` of `tokens` are left.

    No layer can merge more than half of what it has, so a target may be out of reach; then every layer merges half.
    """
    out: list[int] = []
    for k in range(layers):
        wanted = -(-(tokens - target) // (layers - k))
        out.append(max(0, min(wanted, tokens // 2)))
        tokens -= out[-1]
    return out


def geometric_amounts(tokens: int, target: int, layers: int, most: float = 0.5) -> list[int]:
    """Tokens that merge in each of `layers`, the same share of those that each has, so that `target` are left.

    Cheaper than as many in each: later layers run on fewer tokens. A layer merges the share `most` of its tokens at
    most; where that is not enough, more than `target` are left.
    """
    ratio, out, now = max(1, target) / tokens, [], tokens
    for k in range(layers):
        wanted = now - max(target, round(tokens * ratio ** ((k + 1) / layers)))
        out.append(max(0, min(wanted, int(now * most))))
        now -= out[-1]
    return out


def linear_amounts(number: int, slope: float, layers: int) -> list[int]:
    """Tokens that merge in each of `layers`: `number` on average, from (1 - slope) of it rising to (1 + slope)."""
    first = int(number * (1.0 - slope))
    step = (2 * number - 2 * first) / (layers - 1) if layers > 1 else 0.0
    return [int(first + step * k) for k in range(layers)]


def of_list(numbers: Sequence[int], layers: int) -> list[int]:
    """The numbers, with zeros for the layers behind them."""
    return [*numbers[:layers], *[0] * (layers - len(numbers))]
