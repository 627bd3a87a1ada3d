"""Choices among many tokens, readable: diverse ones, representative ones, the best. The Triton kernels run as one program
per row, so a choice is one launch, whatever its number of picks.

Rows are chosen from alone. Ties go to the lower index. Where rows differ in how many tokens they have or want,
`candidates` and `counts` say so, and what a row lacks is -1 at its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.kernels.operation import operation

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
def farthest_first(x: Tensor, count: int, candidates: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """Greedy max-min diversity: each pick is the feature whose nearest pick is farthest.

    With d(i, j) = 1 - cos(x_i, x_j), the first pick is argmax_i min_{j != i} d(i, j), each later one
    argmax_i min_{j picked} d(i, j). Source: DivPrune (arXiv 2503.02175).

    N^2 C operations for the first pick and, beyond 4096 features, N C for each later one, of which only the distance to
    the nearest pick is kept.

    Args:
        x: (B, N, C), N at least 2, compared by cosine in float32.
        count: M, picks per row, at most N.
        candidates: (B, N) bool, features that can be picked; None: all.
        counts: (B,) long, picks of each row, at most M; None: M.

    Returns:
        (B, M) long, in the order of the picks; -1 past a row's count or its candidates.
    """
    if not count:
        return x.new_zeros(x.shape[0], 0, dtype=torch.long)
    x = unit(x)
    gone = None if candidates is None else ~candidates
    held = _others(x, 0, x.shape[1]) if x.shape[1] <= HELD else None
    first = _nearest(x, gone) if held is None else _hide(held, gone).amax(2)
    pick = (first if gone is None else first.masked_fill(gone, torch.inf)).argmin(1, keepdim=True)
    nearest = torch.full(x.shape[:2], -torch.inf, device=x.device)
    nearest = nearest if gone is None else nearest.masked_fill(gone, torch.inf)
    picks = [pick]
    for _ in range(count - 1):
        similar = _row(x, pick) if held is None else _take(held, pick)[:, 0]
        nearest = torch.maximum(nearest, similar).scatter(1, pick, torch.inf)
        pick = nearest.argmin(1, keepdim=True)
        picks.append(pick)
    return _ended(torch.cat(picks, 1), candidates, counts)


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
) -> Tensor:
    """Greedy facility location: each pick adds as much as possible to how well the picks cover what is to be covered.

    With m_i the highest similarity of i with any pick, 0 at first, j gains sum_i w_i relu(C_ij - m_i). For picks that
    stand for all tokens, C holds the cosines of all pairs; for a question, i runs over its words.

    Args:
        similarity: C, (B, I, N): of what is to be covered with what can be picked.
        count: M, picks per row, at most N.
        weight: (B, I), at least 0, how much each i matters; None: all alike.
        candidates: (B, N) bool, what can be picked; None: all.
        counts: (B,) long, picks of each row, at most M; None: M.

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
        pick = gain.masked_fill(gone, -torch.inf).argmax(1, keepdim=True)
        gone = gone.scatter(1, pick, True)
        picks.append(pick)
        column = similarity.gather(2, pick[:, None].expand(-1, similarity.shape[1], -1))[..., 0]
        covered = torch.maximum(covered, column.float())
    return _ended(torch.cat(picks, 1), candidates, counts)


def _select_shape(
    score: Tensor,
    alive: Tensor,
    wanted: Tensor,
    slots: int,
    protected: Tensor | None = None,
    importance: Tensor | None = None,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    return alive.new_empty(alive.shape[0], slots, dtype=torch.long), torch.empty_like(alive, dtype=torch.bool)


@operation(_select_shape, "selecting:select")
def select(
    score: Tensor,
    alive: Tensor,
    wanted: Tensor,
    slots: int,
    protected: Tensor | None = None,
    importance: Tensor | None = None,
    gamma: float = 1.0,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """What a filter keeps: protected tokens first, then the best of the others, in the order of the prompt.

    Args:
        score: (B, N), higher stays; or (B, 2, N), what `text_statistics` gives, of which the score is made:
            max(share / gamma, peak / alpha), where the share is that of the sum over the alive tokens.
        alive: (B, N) bool, what can stay.
        wanted: (B,) long, how many stay; rows with fewer alive tokens keep all of them.
        slots: M, columns of `index`, at least as many as the most that stays in any row (0: only flags are wanted).
        protected: (B, N) bool, tokens before all others; if there are more than `wanted`, the most important stay.
        importance: (B, N), orders the protected ones among themselves; None: the score.
        gamma: divides the share.
        alpha: divides the peak.

    Returns:
        (index, stays): (B, M) long, ascending, -1 behind what stays; and (B, N) bool.
    """
    if score.ndim == 3:
        total, peak = score.float().masked_fill(~alive[:, None], 0).unbind(1)
        share = total / total.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        score = torch.maximum(share / gamma, peak / alpha)
    pool, key, need, stays = alive, score, wanted, None
    if protected is not None:
        must = protected & alive
        over = (must.sum(1) >= wanted)[:, None]  # no room for others: the protected compete among themselves
        key = score if importance is None else torch.where(over, importance.to(score.dtype), score)
        pool = torch.where(over, must, alive & ~must)
        stays = must & ~over
        need = wanted - stays.sum(1)
    lowest = torch.finfo(torch.float64).min  # what is alive comes before what is not, whatever its score
    key = key.double().clamp(min=lowest).masked_fill(~pool, -torch.inf)
    order = key.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(alive.shape[1], device=alive.device)
    best = torch.zeros_like(alive).scatter_(1, order, place < need[:, None]) & pool
    stays = best if stays is None else stays | best
    if not slots:
        return order[:, :0], stays
    index = place.expand_as(alive).masked_fill(~stays, alive.shape[1]).sort(1).values[:, :slots]
    return index.masked_fill(index == alive.shape[1], -1), stays


def unit(x: Tensor) -> Tensor:
    """Features (..., C) of length 1, float32; those without a length stay 0."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def _ended(picks: Tensor, candidates: Tensor | None, counts: Tensor | None) -> Tensor:
    """-1 behind the last pick of each row."""
    if candidates is None and counts is None:
        return picks
    last = picks.new_full((picks.shape[0],), picks.shape[1])
    last = last if candidates is None else last.minimum(candidates.sum(1))
    last = last if counts is None else last.minimum(counts.to(last.device))
    return picks.masked_fill(torch.arange(picks.shape[1], device=picks.device) >= last[:, None], -1)


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
