"""Choices among many tokens, readable: diverse and representative ones.

The Triton kernels run as one program per row, so a choice is one launch, whatever its number of picks.

Rows are chosen from alone. Ties go to the lower index. Where rows differ in how many tokens they have or want,
`candidates` and `counts` say so, and what a row lacks is -1 at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.kernels.operation import operation
from mustdrop.kernels.reference_tokens import best_match, unit

# Up to so many features per row all similarities are computed once and held (64 MiB); above, again where needed.
HELD = 4096
# Similarities of one block where they are not held, in elements.
_BLOCK = 1 << 24
# Squared sine of the angle to the picked features below which float32 cannot tell a feature from their combinations.
NO_VOLUME = 1e-5


def _picks(x: Tensor, count: int) -> Tensor:
    return x.new_empty(x.shape[0], count, dtype=torch.long)


def _farthest_shape(x: Tensor, count: int, *rest: object, **named: object) -> Tensor:
    return _picks(x, count)


def _determinant_shape(x: Tensor, quality: Tensor, count: int, *rest: object, **named: object) -> Tensor:
    return _picks(x, count)


@operation(_farthest_shape, "greedy:farthest_first", 2)
def farthest_first(
    x: Tensor,
    count: int,
    candidates: Tensor | None = None,
    counts: Tensor | None = None,
    weight: Tensor | None = None,
    bonus: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Greedy max-min diversity: each pick is the feature whose nearest pick is farthest.

    With d(i, j) = 1 - cos(x_i, x_j), the first pick is argmax_i w_i min_{j != i} d(i, j) + b_i, each later one
    argmax_i w_i min_{j picked} d(i, j) + b_i, with w = 1 and b = 0 unless given. Source: DivPrune (arXiv 2503.02175);
    the weight is that of Cen-Prune (arXiv 2608.30263), and with w = 1 - l and b = l times a relevance the picks are
    those of maximal marginal relevance.

    N^2 C operations for the first pick and, beyond 4096 features, N C for each later one, of which only the distance to
    the nearest pick is kept.

    Args:
        x: (B, N, C), N at least 2, compared by cosine in float32.
        count: M, picks per row, at most N.
        candidates: (B, N) bool, features that can be picked; None: all.
        counts: (B,) long, picks of each row, at most M; None: M.
        weight: (B, N), at least 0, factor on the distances of each feature that may be picked; None: 1.
        bonus: (B, N), added to them; None: 0.
        first: (B,) long, the first pick of each row, one of its candidates; None: as above.

    Returns:
        (B, M) long, in the order of the picks; -1 past a row's count or its candidates.
    """
    if not count:
        return x.new_zeros(x.shape[0], 0, dtype=torch.long)
    x = unit(x)
    gone = None if candidates is None else ~candidates
    held = _others(x, 0, x.shape[1]) if x.shape[1] <= HELD else None
    if first is None:
        near = _nearest(x, gone) if held is None else _hide(held, gone).amax(2)
        near = near if gone is None else near.masked_fill(gone, torch.inf)
        pick = _farness(near, weight, bonus).argmax(1, keepdim=True)
    else:
        pick = first[:, None]
    nearest = torch.full(x.shape[:2], -torch.inf, dtype=torch.float32, device=x.device)
    nearest = nearest if gone is None else nearest.masked_fill(gone, torch.inf)
    picks = [pick]
    for _ in range(count - 1):
        similar = _row(x, pick) if held is None else _take(held, pick)[:, 0]
        nearest = torch.maximum(nearest, similar).scatter(1, pick, torch.inf)
        pick = _farness(nearest, weight, bonus).argmax(1, keepdim=True)
        picks.append(pick)
    return _ended(torch.cat(picks, 1), candidates, counts)


def _farness(nearest: Tensor, weight: Tensor | None, bonus: Tensor | None) -> Tensor:
    """(B, N) what a pick is chosen by; -inf where the nearest pick is at infinity, which marks what cannot be."""
    if weight is None and bonus is None:
        return -nearest
    far = 1 - nearest if weight is None else weight.float() * (1 - nearest)
    far = far if bonus is None else far + bonus.float()
    return far.masked_fill(nearest == torch.inf, -torch.inf)


@operation(_determinant_shape, "greedy:greedy_determinant", 2)
def greedy_determinant(
    x: Tensor, quality: Tensor, count: int, candidates: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Greedy MAP of a determinantal point process: each pick multiplies det(L_picked) by as much as possible.

    L_ij = q_i cos(x_i, x_j) q_j. With c an incremental Cholesky factor of the cosines, i would multiply the
    determinant by q_i^2 r_i, where r_i = 1 - sum_s c_si^2 is what the picks do not explain of i, and a pick j adds the
    row c_i = (cos(x_j, x_i) - sum_s c_sj c_si) / sqrt(r_j). Source: CDPruner (arXiv 2506.10967), with the recurrence of
    fast greedy MAP inference (arXiv 1709.05135).

    A feature that the picks explain wholly (a duplicate, or any feature once there are as many picks as the rank)
    multiplies by 0. When all do, those of the highest quality follow.

    N M (C + M) operations and N M numbers for M picks; the kernel matrix is not formed.

    Args:
        x: (B, N, C), compared by cosine in float32.
        quality: (B, N), positive.
        count: M, picks per row, at most N.
        candidates: (B, N) bool, features that can be picked; None: all.
        counts: (B,) long, picks of each row, at most M; None: M.

    Returns:
        (B, M) long, in the order of the picks; -1 past a row's count or its candidates.
    """
    if not count:
        return x.new_zeros(x.shape[0], 0, dtype=torch.long)
    x = unit(x)
    weight = quality.float().square()
    last = quality.float() - quality.float().amax(1, keepdim=True) - 1  # below every gain
    left = x.square().sum(2)
    factor = x.new_zeros(len(x), count, x.shape[1])
    gone = torch.zeros_like(left, dtype=torch.bool) if candidates is None else ~candidates
    picks = []
    for step in range(count):
        gain = torch.where(left > NO_VOLUME, weight * left, last).masked_fill(gone, -torch.inf)
        pick = gain.argmax(1, keepdim=True)
        gone = gone.scatter(1, pick, True)
        picks.append(pick)
        before = factor[:, :step]
        own = before.gather(2, pick[:, None].expand(-1, step, -1))
        row = _row(x, pick) - (own.mT @ before)[:, 0]
        rest = left.gather(1, pick)
        row = torch.where(rest > NO_VOLUME, row / rest.clamp(min=NO_VOLUME).sqrt(), 0.0)
        factor[:, step] = row
        left = left - row.square()
    return _ended(torch.cat(picks, 1), candidates, counts)


@operation(_farthest_shape, "greedy:greedy_coverage")
def greedy_coverage(
    similarity: Tensor,
    count: int,
    weight: Tensor | None = None,
    candidates: Tensor | None = None,
    counts: Tensor | None = None,
    quality: Tensor | None = None,
) -> Tensor:
    """Greedy facility location: each pick adds as much as possible to how well the picks cover what is to be covered.

    With m_i the highest similarity of i with any pick, 0 at first, j gains q_j sum_i w_i relu(C_ij - m_i). For picks
    that stand for all tokens, C holds the cosines of all pairs; for a question, i runs over its words.

    Args:
        similarity: C, (B, I, N): of what is to be covered with what can be picked.
        count: M, picks per row, at most N.
        weight: (B, I), at least 0, how much each i matters; None: all alike.
        candidates: (B, N) bool, what can be picked; None: all.
        counts: (B,) long, picks of each row, at most M; None: M.
        quality: (B, N), at least 0, factor on what each pick gains; None: 1.

    Returns:
        (B, M) long, in the order of the picks; -1 past a row's count or its candidates.
    """
    if not count:
        return similarity.new_zeros(similarity.shape[0], 0, dtype=torch.long)
    covered = similarity.new_zeros(similarity.shape[:2], dtype=torch.float32)
    gone = torch.zeros_like(similarity[:, 0], dtype=torch.bool) if candidates is None else ~candidates
    picks = []
    for _ in range(count):
        more = (similarity - covered[..., None]).clamp(min=0)
        gain = more.sum(1) if weight is None else (weight.to(more.dtype)[:, None] @ more)[:, 0]
        gain = gain if quality is None else gain * quality.to(gain.dtype)
        pick = gain.masked_fill(gone, -torch.inf).argmax(1, keepdim=True)
        gone = gone.scatter(1, pick, True)
        picks.append(pick)
        column = similarity.gather(2, pick[:, None].expand(-1, similarity.shape[1], -1))[..., 0]
        covered = torch.maximum(covered, column.float())
    return _ended(torch.cat(picks, 1), candidates, counts)


def _duplicates_shape(x: Tensor, order: Tensor, count: int, most: int = 8) -> Tensor:
    return order.new_empty(order.shape[0], count)


@operation(_duplicates_shape, "duplicates:without_duplicates", 3)
def without_duplicates(x: Tensor, order: Tensor, count: int, most: int = 8) -> Tensor:
    """What stays when features that resemble others are removed, a few per round.

    The features are a list, in `order` at first. In a round those at even places are compared with those at odd places,
    the k whose most similar partner is most similar leave, and the list becomes the even ones that remain, the most
    similar first, then the odd ones; k = min(most, what is too many). Source: VisPruner (arXiv 2412.01818), whose code
    takes lists of even length only. Where k exceeds the even places, all of them leave.

    About (R - count) / most rounds. Up to 4096 listed features, R^2 C operations once and R^2 / 4 look-ups per round;
    above, R^2 C / 4 operations per round, in blocks.

    Args:
        x: (B, N, C).
        order: (B, R) long, the features that compete.
        count: how many of them stay, at most R.
        most: removals per round.

    Returns:
        (B, count) long, the list at the end.
    """
    if not count:
        return order.new_zeros(order.shape[0], 0)
    listed = unit(_take(x, order))
    held = listed @ listed.mT if order.shape[1] <= HELD else None
    place = torch.arange(order.shape[1], dtype=torch.long, device=order.device).expand_as(order)
    while place.shape[1] > count:
        even, odd = place[:, ::2], place[:, 1::2]
        if held is None:
            similar, _ = best_match(_take(listed, even), _take(listed, odd))
        else:
            rows = _take(held, even)
            similar = rows.gather(2, odd[:, None].expand(-1, even.shape[1], -1)).amax(2)
        leave = min(most, place.shape[1] - count, even.shape[1])
        stay = similar.argsort(dim=1, descending=True, stable=True)[:, leave:]
        place = torch.cat([even.gather(1, stay), odd], 1)
    return order.gather(1, place)


def _ended(picks: Tensor, candidates: Tensor | None, counts: Tensor | None) -> Tensor:
    """-1 after the last pick of each row."""
    if candidates is None and counts is None:
        return picks
    last = picks.new_full((picks.shape[0],), picks.shape[1])
    last = last if candidates is None else last.minimum(candidates.sum(1))
    last = last if counts is None else last.minimum(counts.to(last.device))
    return picks.masked_fill(torch.arange(picks.shape[1], dtype=torch.long, device=picks.device) >= last[:, None], -1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _row(x: Tensor, index: Tensor) -> Tensor:
    """(B, N) cosines of the feature `index` (B, 1) of each row with all others, of unit features."""
    return (x @ _take(x, index).mT)[..., 0]


def _others(x: Tensor, start: int, step: int) -> Tensor:
    """(B, step, N) cosines of unit features from `start` on with all others; -inf with themselves."""
    similar = x[:, start : start + step] @ x.mT
    similar.diagonal(start, 1, 2).fill_(-torch.inf)
    return similar


def _hide(similar: Tensor, gone: Tensor | None) -> Tensor:
    return similar if gone is None else similar.masked_fill(gone[:, None], -torch.inf)


def _nearest(x: Tensor, gone: Tensor | None) -> Tensor:
    """(B, N) cosine of each unit feature with the most similar other one that is not gone, in blocks."""
    step = max(1, _BLOCK // x.shape[:2].numel())
    return torch.cat([_hide(_others(x, start, step), gone).amax(2) for start in range(0, x.shape[1], step)], 1)
