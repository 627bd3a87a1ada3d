"""The clock of everything that is timed: it waits until the device has done what it was given."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 2  # pairs of runs that are forgotten


def now(device: torch.device) -> float:
    """Seconds, read after everything that was queued on the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """What a call takes, with all that it queues on the device."""
    start = now(device)
    call()
    return now(device) - start


def median_ratio(pairs: int, plain: Callable[[], float], pruned: Callable[[], float]) -> float:
    """The median of pruned / plain over neighbouring runs, so that drift of the machine cancels.

    Args:
        pairs: how many are compared, after `WARM_UP` more that are forgotten.
        plain: one unpruned run, in seconds; it goes first in each pair.
        pruned: one pruned run, in seconds.
    """
    ratios = []
    for _ in range(pairs + WARM_UP):
        before = plain()
        ratios.append(pruned() / before)
    return statistics.median(ratios[WARM_UP:])
