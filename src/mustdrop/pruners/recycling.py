"""Token recycling: the best of the dropped vision tokens are clustered, and each cluster stays as one token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from mustdrop.constants import numbers
from mustdrop.pruners.base import Settings
from mustdrop.selection import Selection

#: Rows with as many tokens to recycle, (b,) long, None for all of them; how many these are, and how many clusters.
Group = tuple[Tensor | None, int, int]


def groups(sizes: Sequence[tuple[int, int]], device: torch.device) -> list[Group]:
    """The rows that recycle, those of one size together.

    Args:
        sizes: per row, recycled tokens and clusters (see `Recycling.sizes`).
        device: of the rows' numbers.
    """
    made: list[Group] = []
    for size in sorted(set(sizes)):
        rows = [b for b, own in enumerate(sizes) if own == size]
        if size[1]:
            made.append((None if len(rows) == len(sizes) else numbers(rows, device), *size))
    return made


class Recycling(Settings):
    """Merge a part of what a filter drops into a few tokens that stay.

    Source: SparseVLM (arXiv 2410.04417): int(0.3 d) + 1 of d dropped tokens, int(e / 10) + 1 clusters of e recycled
    ones, by density peaks. A cluster's mean takes the place of its centre.

    Attributes:
        share: share of the dropped tokens that is recycled.
        per_cluster: recycled tokens to a cluster.
        seed: seed of the noise below 1e-6 on densities that the released code breaks ties with; None breaks them by
            index.
    """

    share: float = Field(0.3, ge=0, le=1)
    per_cluster: int = Field(10, ge=1)
    seed: int | None = None

    def sizes(self, dropped: int) -> tuple[int, int]:
        """(recycled tokens, clusters) of `dropped` tokens."""
        if dropped <= 0:
            return 0, 0
        recycled = min(int(self.share * dropped) + 1, dropped)
        return recycled, min(int(recycled / self.per_cluster) + 1, recycled)

    def kept(self, present: int, count: int) -> int:
        """How many of `present` tokens a filter may keep, so that with the clusters at most `count` are left.

        0 where there is no room for a token and a cluster: then nothing is recycled.
        """
        if count >= present:
            return present
        low, high = 0, count
        while low < high:  # one more kept token takes at most one cluster away, so the sum does not fall
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle + self.sizes(present - middle)[1] <= count else (low, middle - 1)
        return low

    def plan(self, present: int, count: int) -> tuple[int, int, int]:
        """(kept, recycled, clusters) of `present` tokens of which at most `count` are left, clusters counted."""
        kept = self.kept(present, count)
        return (kept, *self.sizes(present - kept)) if kept else (count, 0, 0)

    def join(self, keep: Tensor, alive: Tensor, score: Tensor, hidden: Tensor, groups: Sequence[Group]) -> Tensor:
        """Which tokens become one, where it is known how many of each row do; nothing waits for the device.

        Args:
            keep: (B, n) bool, tokens that stay as they are.
            alive: (B, n) bool, candidates.
            score: (B, n), orders the dropped ones.
            hidden: (B, n, C), what is clustered.
            groups: see `groups`.

        Returns:
            (B, n) long: for each recycled token the one that stands for its cluster, itself at that one; -1 elsewhere.
        """
        from mustdrop.rules.clusters import density_peaks, tie_noise  # of recycling alone

        into = torch.full(keep.shape, -1, dtype=torch.long, device=keep.device)
        gone = score.double().masked_fill(~alive | keep, -torch.inf)
        order = gone.argsort(dim=1, descending=True, stable=True)
        for rows, recycled, clusters in groups:
            mine, x = (order, hidden) if rows is None else (order[rows], hidden[rows])
            best = mine[:, :recycled]
            noise = None if self.seed is None else tie_noise(recycled, self.seed, hidden.device)
            x = x.gather(1, best[..., None].expand(-1, -1, hidden.shape[2]))
            centres, member = density_peaks(x, clusters, noise)
            stands = best.gather(1, centres).gather(1, member)
            if rows is None:
                return into.scatter(1, best, stands)
            into = into.index_copy(0, rows, into[rows].scatter(1, best, stands))
        return into

    def __call__(self, keep: Tensor, alive: Tensor, score: Tensor, hidden: Tensor, released: bool = False) -> Selection:
        """The survivors of a filter and the clusters of what it drops.

        Args:
            keep: (B, n) bool, tokens that stay as they are.
            alive: (B, n) bool, candidates.
            score: (B, n), orders the dropped ones.
            hidden: (B, n, C), what is clustered.
            released: clusters come after the other survivors, in the order in which their centres were found.

        Returns:
            `Selection` over the n tokens, with `merge_into`.
        """
        from mustdrop.rules.clusters import density_peaks, tie_noise  # of recycling alone

        batch, n = keep.shape
        rows, into = [], torch.full((batch, n), -1, dtype=torch.long, device=keep.device)
        for b in range(batch):
            stays, gone = keep[b].nonzero()[:, 0], (alive[b] & ~keep[b]).nonzero()[:, 0]
            recycled, clusters = self.sizes(len(gone))
            slots = stays
            if clusters:
                best = gone[score[b, gone].double().argsort(descending=True, stable=True)[:recycled]]
                noise = None if self.seed is None else tie_noise(recycled, self.seed, hidden.device)
                centres, member = density_peaks(hidden[b, best], clusters, noise)
                slots = torch.cat([stays, best[centres]])
                order = torch.arange(len(slots), dtype=torch.long, device=slots.device) if released else slots.argsort()
                place = torch.empty_like(order).scatter_(
                    0, order, torch.arange(len(order), dtype=torch.long, device=order.device)
                )
                slots = slots[order]
                into[b, best] = place[len(stays) + member]
                into[b, stays] = place[: len(stays)]
            else:
                into[b, stays] = torch.arange(len(stays), dtype=torch.long, device=stays.device)
            rows.append(slots)
        most = max((len(row) for row in rows), default=0)
        index = torch.zeros(batch, most, dtype=torch.long, device=keep.device)
        valid = torch.zeros(batch, most, dtype=torch.bool, device=keep.device)
        for b, row in enumerate(rows):
            index[b, : len(row)], valid[b, : len(row)] = row, True
        return Selection(index, valid, into)
