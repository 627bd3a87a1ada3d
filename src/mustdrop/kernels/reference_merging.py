"""Merging in the layers of an encoder, readable: which tokens join which, what they become, where each patch went.

The Triton kernels have the same signatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.kernels.operation import operation
from mustdrop.kernels.reference_tokens import means, nearest

NARROW = 256  # channels up to which keys of several heads are matched in one launch
SCANNED = 4096  # tokens up to which each slot looks for its own in one launch
CHAINED = 32  # moves that are followed in one launch


def _slots_shape(
    x: Tensor, number: int, protected: int = 0, numbers: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[-2], dtype=torch.long)


def _slots_launches(x: Tensor, *_: object, **__: object) -> int:
    return 2 if x.shape[-1] <= NARROW else 4


@operation(_slots_shape, "bipartite:bipartite_slots", _slots_launches)
def bipartite_slots(
    x: Tensor, number: int, protected: int = 0, numbers: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Where each token goes if some of them join another one: bipartite soft matching.

    Tokens at even places are sources, those at odd places destinations. The sources whose most similar destination is
    closest join it, at most (N - protected) // 2 of them; then come the other sources and then the destinations, both
    in their order. Where none goes, all stay in their places. Source: ToMe (arXiv 2210.09461).

    Args:
        x: (B, N, D), compared by cosine; or (B, H, N, D), whose mean over H is compared.
        number: tokens that go, in every row.
        protected: tokens at the front that neither go nor are merged into: 0 or 1.
        numbers: (B,) long, tokens that go in each row, in place of `number`; with `lengths`.
        lengths: (B,) long, tokens of each row; those after them are padding.

    Returns:
        (B, N) long, slot of each token, -1 on padding. Among destinations as similar, and among sources as close, the
        lower index comes first.
    """
    batch, n = x.shape[0], x.shape[-2]
    each = torch.arange(n, dtype=torch.long, device=x.device)
    if numbers is None or lengths is None:
        going: int | Tensor = max(0, min(number, (n - protected) // 2))
        length: int | Tensor = n
        if not going:
            return each.expand(batch, n).clone()
    else:
        length = lengths.to(x.device)[:, None]
        going = torch.minimum(numbers.to(x.device)[:, None], (length - protected) // 2).clamp(min=0)
    compared = x.float().mean(1) if x.ndim == 4 else x
    sources, destinations = (length + 1) // 2, length // 2
    source, target = each[: (n + 1) // 2], each[: n // 2]
    ragged = isinstance(destinations, Tensor)
    similar, best = nearest(compared[:, ::2], compared[:, 1::2], target < destinations if ragged else None)
    similar = similar.masked_fill(2 * source < protected, -torch.inf)
    if ragged:
        similar = similar.masked_fill(source >= sources, -torch.inf)
    rank = torch.empty_like(best).scatter_(
        1, similar.argsort(dim=1, descending=True, stable=True), source.expand_as(best)
    )
    goes = rank < going
    place = (~goes).cumsum(1) - 1
    left = sources - going
    into = each.expand(batch, n).clone()
    into[:, ::2] = torch.where(goes, best + left, place)
    into[:, 1::2] = target + left
    if isinstance(length, Tensor) and isinstance(going, Tensor):
        into = torch.where(going > 0, into, each).masked_fill(each >= length, -1)
    return into


def _sized_shape(
    x: Tensor, slot: Tensor, slots: int, size: Tensor | None = None, names: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = x.shape[0]
    return (
        x.new_empty(batch, slots, x.shape[2]),
        x.new_empty(batch, slots, dtype=torch.float32),
        x.new_empty(batch, slots),
        slot.new_empty(batch, slots, dtype=torch.long),
    )


def _sized_launches(x: Tensor, *_: object, **__: object) -> int:
    return 1 if x.shape[1] <= SCANNED else 12


@operation(_sized_shape, "bipartite:merge_sized", _sized_launches, grad=True)
def merge_sized(
    x: Tensor, slot: Tensor, slots: int, size: Tensor | None = None, names: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of the tokens that share a slot, weighed with their sizes, and what else is known of a slot.

    Args:
        x: (B, N, C).
        slot: (B, N) long, slot of each token, -1 where it is gone.
        slots: M, how many there are.
        size: (B, N) float32, patches that each token stands for; None: one.
        names: (B, N) long, the first patch of each token; None: its own number.

    Returns:
        (means, sizes, bias, names): (B, M, C) of the type of `x`, see `merge_tokens`; (B, M) float32, the sums of the
        sizes; (B, M) of the type of `x`, their logarithms, as low as the type goes where there is no token; (B, M)
        long, the lowest names, 0 where there is no token.
    """
    goes = slot.masked_fill(slot < 0, slots)
    each = x.new_ones(goes.shape, dtype=torch.float32) if size is None else size.float()
    mean, whole = means(x, goes, slots, each)
    bias = whole.log().to(x.dtype).clamp(min=torch.finfo(x.dtype).min)
    most = torch.iinfo(torch.long).max
    own = torch.arange(x.shape[1], dtype=torch.long, device=x.device).expand_as(goes) if names is None else names
    first = torch.full((len(goes), slots + 1), most, dtype=torch.long, device=x.device)
    first = first.scatter_reduce(1, goes, own, "amin")[:, :slots]
    return mean, whole.contiguous(), bias, first.masked_fill(first == most, 0)


@operation(
    lambda slots: slots[0].new_empty(slots[0].shape),
    "bipartite:followed",
    lambda slots, *_, **__: max(1, -(-(len(slots) - 1) // (CHAINED - 1))),
)
def followed(slots: list[Tensor]) -> Tensor:
    """Where tokens are after several moves.

    Args:
        slots: each (B, N) long: of the tokens before a move, the slot that each has after it, -1 where it is gone. N of
            each is as many tokens as the move before has left, at least.

    Returns:
        (B, N of the first) long, -1 where a token is gone.
    """
    place = slots[0].clone()
    for slot in slots[1:]:
        place = torch.where(place < 0, -1, slot.gather(1, place.clamp(min=0)))
    return place
