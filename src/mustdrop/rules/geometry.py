"""In which coordinates features are compared, and how distinct each is from all others.

Source: Cen-Prune (arXiv 2608.30263). Features of one picture share a large mean, so that their cosines are all alike;
around that mean they differ. How far a feature lies from the mean direction says, in turn, how distinct it is.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mustdrop.rules.diversity import unit
from mustdrop.rules.scores import min_max

# "raw": features as they are. "centered": around the mean of the picture. "standardized": first each channel is divided
# by its standard deviation over the picture, for encoders in which a few channels carry nearly all of the variance.
Geometry = Literal["raw", "centered", "standardized"]
_EPS = 1e-6


def around_mean(x: Tensor, geometry: Geometry) -> Tensor:
    """(B, N, C) features of B pictures, as they are to be compared."""
    x = scaled(x, geometry)
    return x if geometry == "raw" else x - x.mean(1, keepdim=True)


def distinctiveness(x: Tensor, geometry: Geometry) -> Tensor:
    """(B, N) from 0 to 1: how unlike the other features of its picture each is on average, with the mean still in it.

    The mean cosine with all others is one product with the mean of the unit vectors. "centered" spreads it between the
    least and the most distinct, "standardized" puts its standard score through a sigmoid, and "raw" gives 1 to all.
    """
    if geometry == "raw":
        return torch.ones_like(x[..., 0], dtype=torch.float32)
    directions = unit(scaled(x, geometry))
    n = x.shape[1]
    same = directions.square().sum(2)  # 1, or 0 of a feature without a length
    total = (directions @ directions.sum(1)[..., None])[..., 0]
    unlike = -(total - same) / max(1, n - 1)
    if geometry == "centered":
        return min_max(unlike)
    spread = unlike.std(1, correction=0, keepdim=True)
    return torch.sigmoid((unlike - unlike.mean(1, keepdim=True)) / (spread + _EPS))


def scaled(x: Tensor, geometry: Geometry) -> Tensor:
    """Features with channels of equal variance, if the geometry asks for it."""
    if geometry != "standardized":
        return x
    return x / (x.var(1, correction=0, keepdim=True) + _EPS).sqrt()
