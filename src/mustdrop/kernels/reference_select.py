"""What a filter keeps, readable: the best of each row in the order of the prompt. The Triton kernel is one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.kernels.operation import operation


def _select_shape(
    score: Tensor,
    alive: Tensor,
    wanted: Tensor,
    slots: int,
    protected: Tensor | None = None,
    importance: Tensor | None = None,
    gamma: float = 1.0,
    alpha: float = 1.0,
    others: Tensor | None = None,
    rest: bool = False,
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
    others: Tensor | None = None,
    rest: bool = False,
) -> tuple[Tensor, Tensor]:
    """What a filter keeps: protected tokens first, then the best of the others, in the order of the prompt.

    Args:
        score: (B, N), higher stays; or (B, 2, N), what `text_statistics` gives, of which the score is made:
            max(share / gamma, peak / alpha), where the share is that of the sum over the alive tokens.
        alive: (B, N) bool, what can stay.
        wanted: (B,) long, how many stay; rows with fewer alive tokens keep all of them.
        slots: M, columns of `index`, at most N and at least the most that stays in any row (0: only flags are wanted).
        protected: (B, N) bool, tokens before all others; if there are more than `wanted`, the most important stay.
        importance: (B, N), orders the protected ones among themselves; None: the score.
        gamma: divides the share.
        alpha: divides the peak.
        others: (B, N) bool, what stays besides, counted in `slots` and not in `wanted`: the text of a prompt.
        rest: whether all that is not alive does, in place of `others`.

    Returns:
        (index, stays): (B, M) long, ascending, after as many -1 as a row has fewer; and (B, N) bool.
    """
    if score.ndim == 3:
        total, peak = score.float().masked_fill(~alive[:, None], 0).unbind(1)
        share = total / total.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        score = torch.maximum(share / gamma, peak / alpha)
    pool, key, need, stays = alive, score, wanted, None
    if protected is not None:
        must = protected & alive
        over = (must.sum(1) >= wanted)[:, None]  # no room for others: the protected compete among themselves
        key = score if importance is None else torch.where(over, importance, score)
        pool = torch.where(over, must, alive & ~must)
        stays = must & ~over
        need = wanted - stays.sum(1)
    key = key if key.is_floating_point() else key.double()
    # what is alive comes before what is not, whatever its score
    key = key.clamp(min=torch.finfo(key.dtype).min).masked_fill(~pool, -torch.inf)
    order = key.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(alive.shape[1], dtype=torch.long, device=alive.device)
    best = torch.zeros_like(alive).scatter_(1, order, place < need[:, None]) & pool
    stays = best if stays is None else stays | best
    others = ~alive if rest else others
    stays = stays if others is None else stays | others
    if not slots:
        return order[:, :0], stays
    index = place.expand_as(alive).masked_fill(~stays, -1)
    return index.sort(1).values[:, alive.shape[1] - slots :].contiguous(), stays
