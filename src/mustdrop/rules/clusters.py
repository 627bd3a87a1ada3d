"""Density-peak clustering: centres are dense and far from anything denser."""

from __future__ import annotations

import torch
from torch import Tensor

from mustdrop.rules.ranking import rank_descending


def density_peaks(
    x: Tensor, clusters: int, noise: Tensor | None = None, neighbours: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster the tokens of each row. Nothing waits for the device.

    density = exp(-mean squared distance to the `neighbours` nearest tokens, itself included), with distances divided by
    sqrt(C); delta = distance to the nearest denser token, the largest distance for the densest. Centres are the tokens
    with the largest density * delta, and every token joins its nearest centre. Source: SparseVLM (arXiv 2410.04417).

    Args:
        x: (n, C), or (B, n, C) for several rows.
        clusters: how many, at most n.
        noise: (n,) in [0, 1), added to the densities times 1e-6; None breaks ties by index.
        neighbours: by which density is told; None: as many as clusters.

    Returns:
        (centres, member): (clusters,) long, indices of the centres, the best first; (n,) long, the place of each
        token's centre in it. Both with B in front for several rows.
    """
    if x.ndim == 2:
        centres, member = density_peaks(x[None], clusters, noise, neighbours)
        return centres[0], member[0]
    x = x.float()
    distance = torch.cdist(x, x) / x.shape[2] ** 0.5
    near = min(clusters if neighbours is None else neighbours, x.shape[1])
    density = (-distance.topk(near, dim=2, largest=False).values.square().mean(2)).exp()
    if noise is not None:
        density = density + noise * 1e-6
    rank = rank_descending(density)
    denser = rank[:, None] < rank[..., None]
    delta = distance.masked_fill(~denser, torch.inf).amin(2)
    delta = torch.where(rank == 0, distance.amax((1, 2))[:, None], delta)
    centres = (density * delta).argsort(dim=1, descending=True, stable=True)[:, :clusters]
    member = distance.gather(2, centres[:, None].expand(-1, x.shape[1], -1)).argmin(2)
    own = torch.arange(centres.shape[1], dtype=torch.long, device=x.device).expand_as(centres)
    return centres, member.scatter(1, centres, own)


def tie_noise(n: int, seed: int, device: torch.device | None = None) -> Tensor:
    """(n,) in [0, 1), what the released code breaks ties of densities with. It depends on (n, seed) alone."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu").to(device)
