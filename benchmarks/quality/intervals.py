"""Bootstrap over scenes.

Questions about one scene are not independent of each other, so whole scenes are drawn again: the interval of a mean
over questions is that of the drawn scenes' questions. Scenes of all seeds are drawn alike, since a seed only names a
sequence of independent scenes. One draw serves all methods, so a difference of two is that of the same scenes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DRAWS, SEED, LEVEL = 4000, 0, 0.95
Array = NDArray[np.float64]


@lru_cache(maxsize=4)
def weights(scenes: int, draws: int = DRAWS, seed: int = SEED) -> Array:
    """(draws, scenes), how often each scene is drawn, as a share of the draw."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(scenes, np.full(scenes, 1 / scenes), size=draws) / scenes


def interval(values: Array, scene: NDArray[np.int64] | None = None) -> dict[str, float]:
    """Mean of the questions' values, and the 95 % percentile interval of it.

    Args:
        values: (questions,).
        scene: (questions,), the scene of each, numbered from 0; None where each has one of its own.
    """
    values = np.asarray(values, dtype=np.float64)
    sums, counts = values, np.ones(len(values))
    if scene is not None:
        present, where = np.unique(scene, return_inverse=True)
        sums, counts = (np.bincount(where, x, minlength=len(present)) for x in (values, counts))
    drawn = weights(len(sums))
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile((drawn @ sums) / (drawn @ counts), [tail, 100 - tail])
    return {"mean": _short(values.mean()), "low": _short(low), "high": _short(high)}


def difference(one: Array, other: Array, scene: NDArray[np.int64] | None = None) -> dict[str, float]:
    """`interval` of one minus other on the same questions; clear of zero where one is strictly better or worse."""
    return interval(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64), scene)


def _short(number: float) -> float:
    return round(float(number), 6)
