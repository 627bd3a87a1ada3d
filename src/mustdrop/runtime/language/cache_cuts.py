"""Cache layers that lose entries at the end of the prompt, as many of them at once as hold tensors of one shape.

What each layer keeps is one select over the rows of all of them, and what they store one copy. How many stay is known
to the host, and which ones it asks for when somebody must know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mustdrop import kernels
from mustdrop.constants import sent
from mustdrop.indices import HOST, PAD, on
from mustdrop.kv.cut import AT_ONCE, Cut
from mustdrop.kv.on_device import OnDevice
from mustdrop.pruners import DecodeCachePruner, Received, answers


@dataclass(frozen=True)
class CacheEntries:
    """The entries of a cache layer, on the host. Layers with the same entries share one.

    Attributes:
        positions: (B, slots) long, PAD on padding.
        vision: (B, slots) bool.
        candidates: (B, slots) bool, vision entries that a later token sees.
    """

    positions: Tensor
    vision: Tensor
    candidates: Tensor


def evict(
    decode: DecodeCachePruner, layers: list[Any], entries: list[CacheEntries], budgets: list[Tensor], everything: Tensor
) -> None:
    """The best of the candidates stay in each layer; layers of one shape are cut together.

    Args:
        decode: chooses.
        layers: cache layers whose `attended` is known.
        entries: of each.
        budgets: per layer (B,) long, vision entries that may stay.
        everything: (B,) bool, rows of which nothing leaves any layer.
    """
    alike: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        shapes = tuple((t.shape, t.dtype) for t in (layer.keys, layer.values))
        alike.setdefault((layer.slots, layer.attended.shape, layer.keys.device, shapes), []).append(i)
    for some in alike.values():
        step = max(1, AT_ONCE // max(1, layers[some[0]].storage_bytes()))  # what may exist twice for a moment
        for start in range(0, len(some), step):
            part = some[start : start + step]
            own = [budgets[i] for i in part]
            _evict(decode, [layers[i] for i in part], [entries[i] for i in part], own, everything)


def _evict(
    decode: DecodeCachePruner, layers: list[Any], entries: list[CacheEntries], budgets: list[Tensor], everything: Tensor
) -> None:
    many, device = len(layers), layers[0].keys.device
    positions, vision, candidates = (
        _tables([getattr(own, name) for own in entries]) for name in ("positions", "vision", "candidates")
    )  # (1 or L, B, slots)
    budget, real = _tables(budgets), positions != PAD
    fits = (vision.sum(-1) <= budget) | everything.numpy()
    first = real & (~vision | fits[..., None])  # these stay
    free = real & candidates & ~first
    wanted = first.sum(-1) + np.minimum(free.sum(-1), budget)
    if (wanted == real.sum(-1)).all():
        return
    wanted = np.broadcast_to(wanted, (many, wanted.shape[1]))
    widths: list[int] = wanted.max(1).tolist()
    known = np.broadcast_arrays(candidates, first | free, first, vision)
    flags = sent(np.stack(known), device)
    lacks = np.array(widths)[:, None] - wanted
    index = _chosen(decode, layers, flags[:3], wanted, max(widths))
    padded = bool(lacks.any())
    if padded:
        index = _left_padded(index, on(torch.from_numpy(lacks), device))
    rooms = [layer.room(width) for layer, width in zip(layers, widths, strict=True)]
    stored = _stored(layers, index, rooms)
    ragged = padded or min(widths) < max(widths)
    places, marks = (OnDevice.parts(x, widths) for x in _known(sent(positions, device), flags[3], index, ragged))
    indices = OnDevice.parts(index, widths)
    for i, layer in enumerate(layers):
        layer.attended = layer.queries = None  # nothing is read any more
        layer.store(Cut(indices[i], places[i], marks[i], padded), *stored[2 * i : 2 * i + 2])
    for width in set(widths):  # a static cache counts on its device
        same = [layer for layer, own in zip(layers, widths, strict=True) if own == width]
        same[0].count(same)


def _known(positions: Tensor, vision: Tensor, index: Tensor, ragged: bool) -> tuple[Tensor, Tensor]:
    """(L, B, M) each, positions and marks of the entries `index`; of what is not there where rows are `ragged`, PAD."""
    many, batch, width = index.shape
    rows = [x.expand(many, -1, -1).reshape(many * batch, -1) for x in (positions, vision)]
    places, marks = kernels.gather_rows(rows, index.reshape(many * batch, width), zero=ragged)
    places, marks = places.view(index.shape), marks.view(index.shape)
    return places.masked_fill(index < 0, PAD) if ragged else places, marks


def _tables(values: list[Tensor]) -> np.ndarray:
    """(L, ...), or (1, ...) where it is the same tensor L times, for arithmetic without torch."""
    if all(x is values[0] for x in values):
        return values[0].numpy()[None]
    return torch.stack(values).numpy()


def _chosen(decode: DecodeCachePruner, layers: list[Any], flags: Tensor, wanted: np.ndarray, slots: int) -> Tensor:
    """(L, B, slots) long, the entries that stay, ascending, -1 after them.

    `flags` (3, 1 or L, B, slots) are candidates, what can stay, and what stays before all else.
    """
    many, batch = wanted.shape
    device, n = layers[0].keys.device, layers[0].slots
    seen, alive, first = flags.expand(3, many, -1, -1).reshape(3, many * batch, n).unbind()
    given, queries = [[getattr(layer, name) for layer in layers] for name in ("attended", "queries")]
    score = answers.entries(decode.scorer, Received(_of_all(given, n), _of_all(queries, n)), seen)
    there = on(torch.from_numpy(np.array(wanted, order="C")), device)
    index, _ = kernels.select(score, alive, there.view(-1), slots, first)
    index = index.view(many, batch, slots)
    if (wanted == slots).all():
        return index
    place = torch.arange(slots, dtype=torch.long, device=device) + (slots - there)[..., None]
    return index.gather(2, place.clamp(max=slots - 1)).masked_fill(place >= slots, PAD)


def _of_all(values: list[Tensor], n: int) -> Tensor:
    """(L * B, n) of what layers know of their entries; nothing is known of later ones."""
    base = values[0]._base
    read_together = all(own._base is base and own.storage_offset() == i * own.numel() for i, own in enumerate(values))
    if all(value is values[0] for value in values):
        made: Tensor = values[0].expand(len(values), -1, -1)
    elif base is not None and base.shape == (len(values), *values[0].shape) and read_together:
        made = base
    else:
        made = torch.stack(values)
    made = made.reshape(-1, made.shape[2])
    return made if made.shape[1] == n else torch.nn.functional.pad(made, (0, n - made.shape[1]))


def _left_padded(index: Tensor, lacks: Tensor) -> Tensor:
    """(L, B, M) whose rows end with padding, moved to the right by `lacks` (L, B), what each is short of its layer."""
    place = torch.arange(index.shape[2], dtype=torch.long, device=index.device) - lacks[..., None]
    return index.gather(2, place.clamp(min=0)).masked_fill(place < 0, PAD)


def _stored(layers: list[Any], index: Tensor, rooms: list[int]) -> list[Tensor]:
    """Keys and values of each layer at `index` (L, B, M), and room for later tokens where the layer has it."""
    room = max(rooms)
    if room > index.shape[2]:
        index = torch.nn.functional.pad(index, (0, room - index.shape[2]), value=PAD)
    widths = torch.full((len(layers),), room, dtype=torch.long, device=index.device)
    if min(rooms) < room:
        widths = on(torch.tensor(rooms, dtype=torch.long, device=HOST), index.device)
    return kernels.compact_each([t for layer in layers for t in layer.entries()], index, widths, rooms)


def stacked(values: list[Tensor]) -> Tensor:
    """(L, ...), or (1, ...) where it is the same tensor L times."""
    return values[0][None] if all(value is values[0] for value in values) else torch.stack(values)
