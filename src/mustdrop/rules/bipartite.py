"""Bipartite soft matching: every other token may join the one that it resembles most (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mustdrop import kernels


def join(metric: Tensor, number: int, protected: int = 0) -> tuple[Tensor, int]:
    """Where each token goes if `number` of them join another one.

    See `mustdrop.kernels.bipartite_slots`: what comes out are the sources that stay, then the destinations.

    Args:
        metric: (B, N, D), compared by cosine; or (B, H, N, D), whose mean over H is compared.
        number: tokens that go, at most (N - protected) // 2 do.
        protected: tokens at the front that neither go nor are merged into; one (CLS) at most.

    Returns:
        (into, slots): (B, N) long, slot of each token, and how many slots there are.
    """
    number = max(0, min(number, (metric.shape[-2] - protected) // 2))
    return kernels.bipartite_slots(metric, number, protected), metric.shape[-2] - number


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
    """The numbers, with zeros for the layers after them."""
    return [*numbers[:layers], *[0] * (layers - len(numbers))]
