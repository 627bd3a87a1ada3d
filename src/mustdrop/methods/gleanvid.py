"""GleanVID: what earlier frames did not show (arXiv 2609.37042). For video."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import highest, on_host, sent
from mustdrop.method import DEFAULT_KEEP, Method, Recipe
from mustdrop.pruners import Features, Selection, VisionStagePruner
from mustdrop.pruners.base import Budget
from mustdrop.pruners.vision_rules import Comparing, ComparingRule
from mustdrop.rules.geometry import scaled
from mustdrop.rules.groups import largest_remainder, sizes, spread
from mustdrop.rules.scores import min_max
from mustdrop.rules.segments import frame_means, videos

CELL = 2  # side of the squares by which places are compared over time
RIDGE = 1e-4  # of the mean diagonal of a Gram matrix
SHARPNESS = 4.0  # of the softplus of what is local
EVEN, BENT = 0.6, 0.4  # part of the budget that is shared evenly: EVEN - BENT times the Gini coefficient
SPANNED = 1e-4  # residual, beside the largest of its frame, below which a pick adds no direction
_STEPS = 64  # of the power iteration


class NovelAndLocal(ComparingRule):
    """Frames share the budget by what they add at each place; in a frame stay novel and local features.

    Novel is what the features chosen in earlier frames do not span; local is what resembles its square of four more
    than its frame. The direction in which features vary most is taken out of them first.

    Attributes:
        geometry: "centered" also takes the mean of the image or video out of what is novel. What is local is told by
            means of squares and of frames, with the mean of all still in them.
    """

    by_view: ClassVar[bool] = False

    def choose(self, seen: Features, count: int | None) -> Selection:
        """See `VisionRule.choose`. Each grid of an image is a video of one frame."""
        assert count is not None
        values, features = debiased(self.centred(seen)), scaled(self.compared(seen), self.geometry)
        cell, cells = squares(seen)
        added = self.added(values, seen, kernels.merge_tokens(values, cell, cells), cell)
        means, size = frame_means(features, seen.frame)
        budget = largest_remainder(shares(added, size), count, size)
        own = kernels.merge_tokens(features, cell, cells)
        closer = torch.cosine_similarity(features, spread(own, cell), dim=2) - torch.cosine_similarity(
            features, spread(means, seen.frame), dim=2
        )
        local = torch.nn.functional.softplus(SHARPNESS * closer) / SHARPNESS
        if size.shape[1] == 1:
            return Selection(torch.stack([_best(*row, count).sort().values for row in zip(values, local, strict=True)]))
        return Selection(torch.stack([_picks(*row) for row in zip(values, local, seen.frame, budget, strict=True)]))

    def added(self, values: Tensor, seen: Features, own: Tensor, cell: Tensor) -> Tensor:
        """(B, F), what the squares of each frame add to those at the same places of all earlier frames of the video.

        Args:
            values: (B, N, C).
            seen: where they lie.
            own: (B, cells, C), means of the squares.
            cell: (B, N) long, the square of each feature.
        """
        frames = highest(seen.frame) + 1
        down, across = seen.row // CELL, seen.column // CELL
        wide = highest(seen.column) // CELL + 1
        place = down * wide + across
        places = int((on_host(seen.row) // CELL * wide + on_host(seen.column) // CELL).max()) + 1
        slot = place * frames + seen.frame
        grid = values.new_zeros(len(values), places * frames, values.shape[2])
        grid.scatter_(1, slot[..., None].expand_as(values), spread(own, cell))
        grid = grid.view(len(values), places, frames, -1)
        video = videos(seen.frame, seen.first, frames)
        same = video[:, None, :, None] == video[:, None, None, :]
        residual = residuals((grid @ grid.mT) * same)
        weight = sizes(slot, places * frames).view(len(values), places, frames)
        return (residual * weight).sum(1)


def squares(seen: Features) -> tuple[Tensor, int]:
    """(B, N) long, the square of `CELL` rows and columns that each feature lies in, and how many there are."""
    frame, row, column = (on_host(x) for x in (seen.frame, seen.row, seen.column))
    high, wide = row.max() // CELL + 1, column.max() // CELL + 1
    number = (frame * high + row // CELL) * wide + column // CELL
    found, cell = np.unique(number, return_inverse=True)
    return sent(cell.reshape(frame.shape), seen.frame.device), len(found)


def debiased(values: Tensor) -> Tensor:
    """(B, N, C) without the direction in which they vary most around their mean, by power iteration."""
    mean = values.mean(1, keepdim=True)
    centred = values - mean
    start = centred.square().sum(2).argmax(1)
    v = centred[torch.arange(len(values), dtype=torch.long, device=start.device), start]
    for _ in range(_STEPS):
        v = torch.nn.functional.normalize(v, dim=1)
        v = ((centred @ v[..., None]).mT @ centred)[:, 0]
    v = torch.nn.functional.normalize(v, dim=1)[..., None]
    return centred - (centred @ v) @ v.mT + mean


def residuals(gram: Tensor) -> Tensor:
    """(..., F), length of each vector without its projection on all before it, from their products (..., F, F).

    A ridge keeps the system of nearly dependent vectors solvable.
    """
    gram = gram.double()
    whole = gram.diagonal(0, -2, -1)
    out = [whole[..., 0]]
    eye = torch.eye(gram.shape[-1], dtype=torch.double, device=gram.device)
    for t in range(1, gram.shape[-1]):
        ridge = (RIDGE * whole[..., :t].mean(-1)).clamp(min=1e-12)[..., None, None]
        history, now = gram[..., :t, :t] + ridge * eye[:t, :t], gram[..., :t, t : t + 1]
        out.append(whole[..., t] - (now * torch.linalg.solve(history, now)).sum((-2, -1)))
    return torch.stack(out, -1).clamp(min=0).sqrt().float()


def shares(added: Tensor, size: Tensor) -> Tensor:
    """(B, F), how much each frame keeps: evenly, and the more by what it adds the more frames differ in that.

    Args:
        added: (B, F), not negative.
        size: (B, F) long, features of each frame.
    """
    there = (size > 0).sum(1, keepdim=True)
    total = added.sum(1, keepdim=True).clamp(min=1e-30)
    both = (size > 0)[:, :, None] & (size > 0)[:, None]
    apart = ((added[:, :, None] - added[:, None]).abs() * both).sum((1, 2))[:, None]
    even = EVEN - BENT * apart / (2 * there * total)
    return even * size / size.sum(1, keepdim=True) + (1 - even) * added / total


def _picks(values: Tensor, local: Tensor, frame: Tensor, budget: Tensor) -> Tensor:
    """(M,) long, ascending: what one video keeps, frame by frame."""
    basis = values.new_zeros(values.shape[1], 0)
    picks = []
    shares = [(t, wanted) for t, wanted in enumerate(budget.tolist()) if wanted]
    for t, wanted in shares:
        mine = (frame == t).nonzero()[:, 0]
        best = _best(values[mine], local[mine], wanted, basis)
        picks.append(mine[best])
        if t != shares[-1][0]:
            basis = _extended(basis, values[picks[-1]])
    return torch.cat(picks).sort().values


def _best(values: Tensor, local: Tensor, wanted: int, basis: Tensor | None = None) -> Tensor:
    """(wanted,) long, the most novel and local of a frame; an orthonormal `basis` spans what came before."""
    # what is left of a vector is the whole less what the basis holds of it
    novel = values.square().sum(1)
    novel = novel if basis is None else novel - (values @ basis).square().sum(1)
    score = min_max(local[None])[0] + min_max(novel.clamp(min=0).sqrt()[None])[0]
    return score.argsort(descending=True, stable=True)[:wanted]


def _extended(basis: Tensor, x: Tensor) -> Tensor:
    """An orthonormal basis (C, R) with the directions of vectors (n, C) that it does not span."""
    if basis.shape[1] >= basis.shape[0]:
        return basis
    left = x.T - basis @ (basis.T @ x.T)
    left = left - basis @ (basis.T @ left)  # once more, against rounding
    q, r = torch.linalg.qr(left)
    size = r.diagonal().abs()
    own = q[:, size > SPANNED * size.max().clamp(min=1e-12)]
    return torch.cat([basis, own], 1)[:, : basis.shape[0]]


class GleanVid(Comparing, Recipe):
    """Keep what is new and local in each frame, more of frames that add much; before the first decoder layer.

    Attributes:
        keep: tokens (int) or share of the prompt's vision tokens.
        geometry: in which coordinates features are novel: "raw" as they are, "centered" around their mean,
            "standardized" those of the encoder, around their mean and with channels of equal variance.
    """

    keep: Budget = DEFAULT_KEEP

    def build(self) -> Method:
        """Only the vision socket is filled."""
        rule = NovelAndLocal(geometry=self.geometry)
        return Method(vision=VisionStagePruner(window=None, key_share=0, keep=self.keep, score=rule))
