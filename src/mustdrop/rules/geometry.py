"""In which coordinates features are compared, and how distinct each is from all others.

Source: Cen-Prune (arXiv 2608.30263). Features of one picture share a large mean, so that their cosines are all alike;
around that mean they differ. How far a feature lies from the mean direction says, in turn, how distinct it is.

The mean is that of what is compared: of a view or, where all views of an image or video compete, of the image or video,
its frames together. Features that are compared with the mean of their frame or video, and frames that are compared by
their means, stay as they are, as in Cen-Prune's distinctiveness: of the mean itself, and of a still video's frames,
centring leaves nothing to compare.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mustdrop.rules.diversity import unit
from mustdrop.rules.scores import min_max, min_max_in_groups

# "raw": features as they are. "centered": around their mean. "standardized": first each channel is divided by its
# standard deviation, for encoders in which a few channels carry nearly all of the variance.
Geometry = Literal["raw", "centered", "standardized"]
_EPS = 1e-6


def around_mean(x: Tensor, geometry: Geometry, real: Tensor | None = None) -> Tensor:
    """(B, N, C) features of B pictures, as they are to be compared.

    Args:
        x: features; "raw" leaves them what they are, whatever their type.
        geometry: in which coordinates.
        real: (B, N) bool, which features mean and variance are those of; None: all.
    """
    if geometry == "raw":
        return x
    x = scaled(x, geometry, real)
    return x - _mean(x, real)


def distinctiveness(x: Tensor, geometry: Geometry, real: Tensor | None = None) -> Tensor:
    """(B, N) from 0 to 1: how unlike the other features of its picture each is on average, with the mean still in it.

    The mean cosine with all others is one product with the mean of the unit vectors. "centered" spreads it between the
    least and the most distinct, "standardized" puts its standard score through a sigmoid, and "raw" gives 1 to all.

    Args:
        x: (B, N, C) features, neither centred nor scaled.
        geometry: in which coordinates.
        real: (B, N) bool, which features there are; what the others get says nothing. None: all.
    """
    if geometry == "raw":
        return torch.ones_like(x[..., 0], dtype=torch.float32)
    directions = unit(scaled(x, geometry, real))
    n: Tensor | int = x.shape[1]
    if real is not None:
        directions, n = directions.masked_fill(~real[..., None], 0), real.sum(1, keepdim=True)
    same = directions.square().sum(2)  # 1, or 0 of a feature without a length
    total = (directions @ directions.sum(1)[..., None])[..., 0]
    unlike = (same - total) / (max(1, n - 1) if isinstance(n, int) else (n - 1).clamp(min=1))
    if geometry == "centered":
        return min_max(unlike) if real is None else min_max_in_groups(unlike, (~real).long(), 2)
    apart = unlike - _mean(unlike[..., None], real)[..., 0]
    spread = _mean(apart.square()[..., None], real)[..., 0].sqrt()
    return torch.sigmoid(apart / (spread + _EPS))


def scaled(x: Tensor, geometry: Geometry, real: Tensor | None = None) -> Tensor:
    """Features with channels of equal variance, if the geometry asks for it; arguments as for `around_mean`."""
    x = x.float()
    if geometry != "standardized":
        return x
    return x / (_mean((x - _mean(x, real)).square(), real) + _EPS).sqrt()


def _mean(x: Tensor, real: Tensor | None) -> Tensor:
    """(B, 1, C) mean of the features (B, N, C) that are real."""
    if real is None:
        return x.mean(1, keepdim=True)
    total = x.masked_fill(~real[..., None], 0).sum(1, keepdim=True)
    return total / real.sum(1).clamp(min=1)[:, None, None]
