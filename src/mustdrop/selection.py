"""`Selection`: what every rule of every stage returns. Dropping and merging are the same operation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import every
from mustdrop.errors import ConfigError
from mustdrop.indices import take


@dataclass(frozen=True)
class Selection:
    """Which tokens of a batch survive, and into which survivor each other token was merged.

    Attributes:
        keep: (B, M) long, indices of the surviving tokens, each once, ascending; a rule of the vision stage may name
            them in another order, which compat="released" hands on. Rows with fewer than M survivors are padded at the
            end; padding holds index 0.
        valid: (B, M) bool, False on padding; left out, there is none.
        merge_into: (B, N) long or None. The slot (column of `keep`) that token n became part of, -1 where it is gone.
            None means that nothing was merged: tokens that are not kept are gone.
        blend: (B, N, C) -> (B, M, C), the values of the survivors, in the order of `keep`. It must be linear in the
            tokens, because it is applied to whichever states the model goes on with. None: the means of what was
            merged, here in `apply`; the vision stage of a model leaves the values as they are.
        score: (B, N) what `best` ranked by, for whoever checks the selection.
    """

    keep: Tensor
    valid: Tensor = None  # type: ignore[assignment]  # never None afterwards
    merge_into: Tensor | None = None
    blend: Callable[[Tensor], Tensor] | None = None
    score: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """No padding unless something was said of it."""
        if self.valid is None and isinstance(self.keep, Tensor):
            object.__setattr__(self, "valid", every(tuple(self.keep.shape), self.keep.device))

    @classmethod
    def best(cls, score: Tensor, count: int) -> Selection:
        """The `count` highest of `score` (B, N), ascending by index; ties go to the lower index."""
        if score.ndim != 2:
            raise ConfigError(f"Selection.best ranks scores (B, N), got a tensor of shape {tuple(score.shape)}.")
        order = score.argsort(dim=1, descending=True, stable=True)[:, :count]
        return cls(order.sort(1).values, score=score)

    @classmethod
    def picked(cls, picks: Tensor) -> Selection:
        """The tokens `picks` (B, M), ascending by index."""
        return cls(picks.sort(1).values)

    @classmethod
    def merged(cls, keep: Tensor, into: Tensor, weight: Tensor | None = None) -> Selection:
        """Survivors `keep` (B, M) that become the mean of what joins them as `into` (B, N) says, by `weight` (B, N)."""
        return cls(keep, merge_into=into, blend=lambda x: kernels.merge_tokens(x, into, keep.shape[1], weight))

    @classmethod
    def from_mask(cls, alive: Tensor, order: Tensor | None = None) -> Selection:
        """Selection of the True positions of `alive`, (B, N) bool, ascending by index or by `order`, (B, N) long."""
        if len(alive) == 1 and alive.device.type == "cpu" and order is None:  # one row needs no padding
            keep = alive.nonzero()[None, :, 1]
            return cls(keep, torch.ones(keep.shape, dtype=torch.bool, device=keep.device))
        index = torch.arange(alive.shape[1], dtype=torch.long, device=alive.device).expand_as(alive)
        last = torch.iinfo(torch.long).max
        counts = alive.sum(1)
        slots = int(counts.max()) if alive.numel() else 0
        keep = (index if order is None else order).masked_fill(~alive, last).argsort(dim=1, stable=True)[:, :slots]
        valid = torch.arange(slots, dtype=torch.long, device=alive.device) < counts[:, None]
        return cls(keep.masked_fill(~valid, 0), valid)

    @property
    def counts(self) -> Tensor:
        """(B,) long, survivors per row."""
        return self.valid.sum(1)

    def to(self, device: torch.device) -> Selection:
        """The same on another device; `blend` still computes where its own tensors are."""
        into, score = (None if x is None else x.to(device) for x in (self.merge_into, self.score))
        moved = replace(self, keep=self.keep.to(device), valid=self.valid.to(device), merge_into=into, score=score)
        if self.blend is None or moved.keep.device == self.keep.device:
            return moved
        return replace(moved, blend=functools.partial(_blended_on, self.keep.device, self.blend))

    def mask(self, n: int) -> Tensor:
        """(B, n) bool, True at surviving tokens."""
        out = torch.zeros(self.keep.shape[0], n + 1, dtype=torch.bool, device=self.keep.device)
        return out.scatter_(1, self.keep.masked_fill(~self.valid, n), True)[:, :n]

    def assignment(self, n: int) -> Tensor:
        """(B, n) long, token -> slot, -1 where the token is gone."""
        if self.merge_into is not None:
            return self.merge_into
        out = torch.full((self.keep.shape[0], n + 1), -1, dtype=torch.long, device=self.keep.device)
        slot = torch.arange(self.keep.shape[1], dtype=torch.long, device=self.keep.device).expand_as(self.keep)
        return out.scatter_(1, self.keep.masked_fill(~self.valid, n), slot)[:, :n]

    def apply(self, x: Tensor) -> Tensor:
        """Survivors of `x` (B, N, C) as (B, M, C): gathered, means of what was merged, or blended. Padding is zero."""
        if self.blend is not None:
            out = self.blend(x)
        elif self.merge_into is None:
            out = take(x, self.keep, 1, padded=False)
        else:
            out = kernels.merge_tokens(x, self.merge_into, self.keep.shape[1])
        return out.masked_fill(~self.valid[..., None], 0)

    def sizes(self) -> Tensor:
        """(B, M) long, how many original tokens each slot stands for (0 on padding)."""
        if self.merge_into is None:
            return self.valid.long()
        slots = self.keep.shape[1]
        slot = self.merge_into.masked_fill(self.merge_into < 0, slots)
        ones = torch.ones_like(slot)
        return torch.zeros(slot.shape[0], slots + 1, dtype=torch.long, device=slot.device).scatter_add_(1, slot, ones)[
            :, :slots
        ]

    def expand(self, x: Tensor, n: int) -> Tensor:
        """Inverse of `apply`: (B, M, C) -> (B, n, C), every token gets its slot's row (zero where it is gone)."""
        slot = self.assignment(n)
        out = take(x, slot, 1)
        return out.masked_fill((slot < 0)[..., None], 0)


def _blended_on(device: torch.device, blend: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """What `blend`, whose tensors are on `device`, makes of values on any device, on theirs."""
    return blend(values.to(device)).to(values.device)
