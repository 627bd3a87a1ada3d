"""Cutting places of a raster into nearly square cells, exactly as many as asked for."""

from __future__ import annotations

import math

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
    out = torch.empty_like(place[0])
    first = 0
    runs = _runs(place[:1], min(cells, len(torch.unique(place[0]))))
    for mine, number in zip(_members(runs), _shares(runs, cells), strict=True):
        frame, row, column = here = place[:, mine]
        lines = torch.unique(here[:2], dim=1).shape[1]
        bands = round(math.sqrt(number * lines * lines / len(mine)))
        bands = min(max(bands, -(-number * lines // len(mine))), lines, number)
        band = _runs(here[:2], bands)
        sizes, shares = torch.bincount(band), torch.tensor(_shares(band, number), dtype=torch.long, device="cpu")
        order = torch.arange(len(mine), dtype=torch.long, device="cpu")
        for key in (row, frame, column, band):  # the last sort counts most
            order = order[key[order].argsort(stable=True)]
        band = band[order]
        rank = torch.arange(len(mine), dtype=torch.long, device="cpu") - (sizes.cumsum(0) - sizes)[band]
        out[mine[order]] = first + (shares.cumsum(0) - shares)[band] + rank * shares[band] // sizes[band]
        first += number
    return out


def centres(place: Tensor, cell: Tensor) -> Tensor:
    """The member of each cell that lies nearest to its middle; ties go to the lower index.

    Args:
        place: (3, N) long.
        cell: (N,) long, 0 to K - 1, none empty.

    Returns:
        (K,) long.
    """
    size = torch.bincount(cell)
    total = torch.zeros(len(place), len(size), dtype=torch.long, device="cpu").index_add_(1, cell, place)
    away = (place * size[cell] - total[:, cell]).square().sum(0)  # whole numbers: ties are exact
    order = away.argsort(stable=True)
    order = order[cell[order].argsort(stable=True)]
    return order[size.cumsum(0) - size]


def _runs(key: Tensor, number: int) -> Tensor:
    """(N,) long: distinct columns of `key` (k, N), in their order, cut into `number` runs of about equal length."""
    found, rank = torch.unique(key, dim=1, return_inverse=True)
    run: Tensor = rank * number // found.shape[1]
    return run


def _members(part: Tensor) -> list[Tensor]:
    return [(part == p).nonzero()[:, 0] for p in range(int(part.max()) + 1)]


def _shares(part: Tensor, cells: int) -> list[int]:
    """Cells of each part: at least one, at most as many as it has members, else in proportion to them."""
    sizes: list[int] = torch.bincount(part).tolist()
    spare = [size - 1 for size in sizes]
    more = share_out(cells - len(sizes), spare) if any(spare) else spare
    return [1 + n for n in more]
