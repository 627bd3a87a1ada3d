"""Token recycling: the best of the dropped vision tokens are clustered, and each cluster stays as one token."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mustdrop.pruners.base import Settings
from mustdrop.selection import Selection


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
