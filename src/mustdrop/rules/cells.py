"""Cutting places of a raster into nearly square cells, exactly as many as asked for."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mustdrop.budget import share_out


def square_cells(place: Tensor, cells: int) -> Tensor:
    """Cut N places into `cells` cells, none of them empty.

    Frames come first: where there are fewer cells than frames, neighbouring frames share one. The lines of a frame are
    cut into bands, about sqrt(cells * lines / width) of them, so that cells are about square. Every band has its part
    of the cells and is cut along its width. On a whole raster whose sides are multiples of the pooled sides this is
    plain pooling. Lines and columns may miss places. O(N log N).

    Args:
        place: (3, N) long: frame, row and column of each.
        cells: 1 to N.

    Returns:
        (N,) long, the cell of each place.
    """
    here = place.numpy()
    out, first = np.empty_like(here[0]), 0
    runs = _runs(here[:1], min(cells, len(np.unique(here[0]))))
    for mine, number in zip(_members(runs), _shares(runs, cells), strict=True):
        frame, row, column = own = here[:, mine]
        lines = len(np.unique(_columns(own[:2])))
        bands = round(math.sqrt(number * lines * lines / len(mine)))
        bands = min(max(bands, -(-number * lines // len(mine))), lines, number)
        band = _runs(own[:2], bands)
        sizes, shares = np.bincount(band), np.array(_shares(band, number), dtype=np.int64)
        order = np.lexsort((row, frame, column, band))  # the last key counts most
        band = band[order]
        rank = np.arange(len(mine)) - (sizes.cumsum() - sizes)[band]
        out[mine[order]] = first + (shares.cumsum() - shares)[band] + rank * shares[band] // sizes[band]
        first += number
    return torch.from_numpy(out)


def centres(place: Tensor, cell: Tensor) -> Tensor:
    """The member of each cell that lies nearest to its middle; ties go to the lower index.

    Args:
        place: (3, N) long.
        cell: (N,) long, 0 to K - 1, none empty.

    Returns:
        (K,) long.
    """
    here, own = place.numpy(), cell.numpy()
    size = np.bincount(own)
    total = np.zeros((len(here), len(size)), dtype=np.int64)
    for row, values in zip(total, here, strict=True):
        np.add.at(row, own, values)
    away = np.square(here * size[own] - total[:, own]).sum(0)  # whole numbers: ties are exact
    return torch.from_numpy(np.lexsort((away, own))[size.cumsum() - size])


def _runs(key: np.ndarray, number: int) -> np.ndarray:
    """(N,) long: distinct columns of `key` (k, N), in their order, cut into `number` runs of about equal length."""
    found, rank = np.unique(_columns(key), return_inverse=True)
    return rank * number // len(found)


def _columns(key: np.ndarray) -> np.ndarray:
    """(N,) long, numbers that are equal and ordered as the columns of `key` (k, N) are."""
    line: np.ndarray = key[0]
    for more in key[1:]:
        line = line * (np.ptp(more) + 1) + more - more.min()
    return line


def _members(part: np.ndarray) -> list[np.ndarray]:
    return [(part == p).nonzero()[0] for p in range(int(part.max()) + 1)]


def _shares(part: np.ndarray, cells: int) -> list[int]:
    """Cells of each part: at least one, at most as many as it has members, else in proportion to them."""
    sizes: list[int] = np.bincount(part).tolist()
    spare = [size - 1 for size in sizes]
    more = share_out(cells - len(sizes), spare) if any(spare) else spare
    return [1 + n for n in more]
