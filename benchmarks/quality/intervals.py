"""Bootstrap over scenes.

Questions about one scene are not independent of each other, so whole scenes are drawn again: the interval of a mean
over questions is that of the mean over scenes of each scene's mean (every scene has as many questions as any other).
Scenes of all seeds are drawn alike, since a seed only names a sequence of independent scenes. One draw serves all
methods, so a difference of two is that of the same scenes.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DRAWS, SEED, LEVEL = 4000, 0, 0.95


@lru_cache(maxsize=4)
def weights(scenes: int, draws: int = DRAWS, seed: int = SEED) -> NDArray[np.float64]:
    """(draws, scenes), how often each scene is drawn, as a share of the draw."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(scenes, np.full(scenes, 1 / scenes), size=draws) / scenes


def interval(per_scene: NDArray[np.float64]) -> dict[str, float]:
    """Mean of the scenes' values, and the 95 % percentile interval of it."""
    values = np.asarray(per_scene, dtype=np.float64)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(weights(len(values)) @ values, [tail, 100 - tail])
    return {"mean": _short(values.mean()), "low": _short(low), "high": _short(high)}


def difference(one: NDArray[np.float64], other: NDArray[np.float64]) -> dict[str, float]:
    """`interval` of one minus other on the same scenes; it is clear of zero where one is strictly better or worse."""
    return interval(np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64))


def _short(number: float) -> float:
    return round(float(number), 6)
