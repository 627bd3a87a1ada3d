"""References in fewer steps, for tensors of the host: the same numbers, bit for bit.

An operation of torch on a few hundred numbers takes several times as long as one of numpy, and a choice among them is
all small operations. What adds numbers up stays torch's, whose order of adding is the reference's.

What arguments mean and which defaults they have is written at the reference; a function here must have its
parameters, and answers None where only the reference will do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mustdrop.kernels.operation import OPERATIONS
from mustdrop.kernels.reference_choices import HELD, NO_VOLUME
from mustdrop.kernels.reference_tokens import matches_at_once, unit

F = TypeVar("F", bound=Callable[..., Any])
_FLOATS = (torch.float32, torch.float64)  # what numpy computes with as torch does


def _on_host(function: F) -> F:
    """Runs on the host instead of the reference of the same name."""
    known = OPERATIONS[function.__name__]

    @functools.wraps(function)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):  # torch says nothing of 0 x infinity either
            made = function(*args, **kwargs)
        return known.reference(*args, **kwargs) if made is None else made

    known.on_host = quiet
    return function


def _numbers(x: Tensor) -> np.ndarray:
    return (x.detach() if x.requires_grad else x).numpy()


def _descending(key: np.ndarray) -> np.ndarray | None:
    """(B, N) places from the highest to the lowest, the lower place first among equals; None where a NaN is."""
    order = (-key).argsort(1, kind="stable")
    last = key[:, order[0, -1]] if len(key) == 1 else key[np.arange(len(key)), order[:, -1]]
    return None if np.isnan(last).any() else order  # numpy puts them last and torch first


@_on_host
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
) -> tuple[Tensor, Tensor] | None:
    """See `mustdrop.kernels.select`."""
    half = any(x is not None and x.is_floating_point() and x.dtype not in _FLOATS for x in (score, importance))
    if half or not alive.numel():
        return None
    there, need = _numbers(alive), _numbers(wanted)
    key = _key(score, alive, there, gamma, alpha)
    pool, stays = there, None
    if protected is not None:
        must = _numbers(protected) & there
        over = (must.sum(1) >= need)[:, None]
        key = key if importance is None else np.where(over, _numbers(importance), key)
        stays = must & ~over
        pool = np.where(over, must, there & ~must)
        need = need - stays.sum(1)
    key = key if key.dtype.kind == "f" else key.astype(np.float64)
    order = _descending(np.where(pool, np.maximum(key, np.finfo(key.dtype).min), -np.inf))
    if order is None:
        return None
    best = np.zeros(there.shape, dtype=bool)
    for row, places, n in zip(best, order, need.tolist(), strict=True):
        row[places[: max(0, n)]] = True
    best &= pool
    if stays is not None:
        best |= stays
    if rest or others is not None:
        best |= ~there if rest else _numbers(others)  # type: ignore[arg-type]
    index = np.full((len(best), slots), -1, dtype=np.int64)
    for row, flags in zip(index, best if slots else (), strict=bool(slots)):
        own = flags.nonzero()[0][-slots:]
        row[slots - len(own) :] = own
    return torch.from_numpy(index), torch.from_numpy(best)


def _key(score: Tensor, alive: Tensor, there: np.ndarray, gamma: float, alpha: float) -> np.ndarray:
    """(B, N) what a choice is made by: the score, or what the statistics (B, 2, N) say."""
    if score.ndim == 2:
        return _numbers(score)
    seen = score.float().masked_fill(~alive[:, None], 0)
    whole = _numbers(seen[:, 0].sum(1, keepdim=True))
    total, peak = _numbers(seen).transpose(1, 0, 2)
    share = total / np.maximum(whole, np.finfo(np.float32).tiny)
    return np.maximum(share / np.float32(gamma), peak / np.float32(alpha))  # type: ignore[no-any-return]


@_on_host
def farthest_first(
    x: Tensor,
    count: int,
    candidates: Tensor | None = None,
    counts: Tensor | None = None,
    weight: Tensor | None = None,
    bonus: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor | None:
    """See `mustdrop.kernels.farthest_first`."""
    batch, n = x.shape[:2]
    if not count or not batch or n > HELD:
        return None
    x, rows = unit(x), np.arange(batch)
    held = _numbers(x @ x.mT)
    held[:, np.arange(n), np.arange(n)] = -np.inf
    gone = None if candidates is None else ~_numbers(candidates)
    factor, more = (None if t is None else _numbers(t.float()) for t in (weight, bonus))

    def farthest(near: np.ndarray) -> np.ndarray:
        if factor is None and more is None:
            return (-near).argmax(1)  # type: ignore[no-any-return]
        far = np.float32(1) - near
        far = far if factor is None else factor * far
        far = far if more is None else far + more
        far[near == np.inf] = -np.inf
        return far.argmax(1)  # type: ignore[no-any-return]

    near = np.full((batch, n), -np.inf, dtype=np.float32)
    if first is None:
        near = held.max(2) if gone is None else np.where(gone[:, None], np.float32(-np.inf), held).max(2)
    nearest = np.full((batch, n), -np.inf, dtype=np.float32)
    if gone is not None:
        near[gone] = nearest[gone] = np.inf
    picks = np.empty((batch, count), dtype=np.int64)
    picks[:, 0] = farthest(near) if first is None else _numbers(first)
    for step in range(1, count):
        pick = picks[:, step - 1]
        nearest = np.maximum(nearest, held[rows, pick])
        nearest[rows, pick] = np.inf
        picks[:, step] = farthest(nearest)
    return _ended(picks, candidates, counts)


def _ended(picks: np.ndarray, candidates: Tensor | None, counts: Tensor | None) -> Tensor:
    """-1 behind the last pick of each row."""
    if candidates is not None or counts is not None:
        ends = np.full(len(picks), picks.shape[1])
        ends = ends if candidates is None else np.minimum(ends, _numbers(candidates).sum(1))
        ends = ends if counts is None else np.minimum(ends, counts.cpu().numpy())
        picks[np.arange(picks.shape[1]) >= ends[:, None]] = -1
    return torch.from_numpy(picks)


@_on_host
def greedy_determinant(
    x: Tensor, quality: Tensor, count: int, candidates: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """See `mustdrop.kernels.greedy_determinant`."""
    batch, n = x.shape[:2]
    if not count or not batch:
        return x.new_zeros(batch, count, dtype=torch.long)
    x = unit(x)
    own, rated, rows = _numbers(x), _numbers(quality.float()), np.arange(batch)
    weight, last = rated * rated, rated - rated.max(1, keepdims=True) - np.float32(1)
    left = _numbers(x.square().sum(2))
    gone = np.zeros((batch, n), dtype=bool) if candidates is None else ~_numbers(candidates)
    kept, picks = np.zeros((batch, count, n), dtype=np.float32), np.empty((batch, count), dtype=np.int64)
    factor = torch.from_numpy(kept)
    least, nothing = np.float32(NO_VOLUME), np.float32(0)
    for step in range(count):  # as the reference does it
        gain = np.where(left > least, weight * left, last)
        gain[gone] = -np.inf
        pick = picks[:, step] = gain.argmax(1)
        gone[rows, pick] = True
        similar = (x @ torch.from_numpy(own[rows, pick][:, None]).mT)[..., 0].numpy()
        if step:
            before = torch.from_numpy(kept[rows, :step, pick][:, None])
            similar = similar - (before @ factor[:, :step])[:, 0].numpy()
        else:
            similar = similar - nothing
        rest = left[rows, pick][:, None]
        row = kept[:, step]
        row[:] = np.where(rest > least, similar / np.sqrt(np.maximum(rest, least)), nothing)
        left = left - row * row
    return _ended(picks, candidates, counts)


def _nearest(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of unit features (B, N, C), the most similar one at an odd place of each at an even place, and its cosine."""
    from_, to = x[:, ::2], x[:, 1::2].mT
    step = matches_at_once(x.shape[0], from_.shape[1], to.shape[2], x.shape[2])
    found = [(from_[:, start : start + step] @ to).numpy() for start in range(0, from_.shape[1], step)]
    best, close = [part.argmax(2) for part in found], [part.max(2) for part in found]
    return (best[0], close[0]) if len(found) == 1 else (np.concatenate(best, 1), np.concatenate(close, 1))


@_on_host
def bipartite_slots(
    x: Tensor, number: int, protected: int = 0, numbers: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor | None:
    """See `mustdrop.kernels.bipartite_slots`."""
    batch, n = x.shape[0], x.shape[-2]
    going = max(0, min(number, (n - protected) // 2))
    sources, targets = (n + 1) // 2, n // 2
    ragged = numbers is not None and lengths is not None
    if ragged or not going or not batch:
        return None
    best, close = _nearest(unit(x.float().mean(1) if x.ndim == 4 else x))
    close[:, : (protected + 1) // 2] = -np.inf
    order = _descending(close)
    if order is None:
        return None
    goes = np.zeros(close.shape, dtype=bool)
    goes[np.arange(batch)[:, None], order[:, :going]] = True
    into = np.empty((batch, n), dtype=np.int64)
    into[:, ::2] = np.where(goes, best + (sources - going), (~goes).cumsum(1) - 1)
    into[:, 1::2] = np.arange(sources - going, sources - going + targets)
    return torch.from_numpy(into)


@_on_host
def merge_sized(
    x: Tensor, slot: Tensor, slots: int, size: Tensor | None = None, names: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """See `mustdrop.kernels.merge_sized`."""
    there = _numbers(slot)
    batch, n = there.shape
    if not batch or not n or there.min() < 0:
        return None
    each = x.new_ones(slot.shape, dtype=torch.float32) if size is None else size.float()
    whole = torch.zeros(batch, slots, dtype=torch.float32, device="cpu").scatter_add_(1, slot, each)
    values = x.float() * each[..., None]
    total = torch.zeros(batch, slots, x.shape[2], dtype=torch.float32, device="cpu")
    total = total.scatter_add_(1, slot[..., None].expand_as(values), values)
    empty = _numbers(whole) <= 0
    mean = total / (torch.where(whole > 0, whole, 1.0) if empty.any() else whole)[..., None]
    first = np.full((batch, slots), np.iinfo(np.int64).max)
    own = np.broadcast_to(np.arange(n), there.shape) if names is None else _numbers(names)
    for row, places, name in zip(first, there, own, strict=True):
        np.minimum.at(row, places, name)
    first[first == np.iinfo(np.int64).max] = 0
    bias = whole.log().to(x.dtype).clamp(min=torch.finfo(x.dtype).min)
    return mean.to(x.dtype), whole, bias, torch.from_numpy(first)
