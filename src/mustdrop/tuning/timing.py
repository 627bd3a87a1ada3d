"""The time of a prompt, pruned and not, in neighbouring runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from mustdrop.fidelity import respond
from mustdrop.method import Method
from mustdrop.patching import patched, unpatched

WARM_UP = 2


def prompt_share(model: Any, inputs: Mapping[str, Any], method: Method, pairs: int = 5) -> float:
    """Time for a prompt as a share of the unpruned model's: encoder, pruning, prefill and the first token.

    The two take turns and neighbours are compared, so that drift of the machine cancels; the median of the pairs is
    returned.

    Args:
        model: patched or not; it is left as it came.
        inputs: what the processor returned.
        method: pruned by it.
        pairs: how many runs of each are compared, after two that warm up.
    """

    def seconds() -> float:
        _synchronize(model)
        start = time.perf_counter()
        respond(model, inputs, 1)
        _synchronize(model)
        return time.perf_counter() - start

    ratios = []
    for _ in range(pairs + WARM_UP):
        with unpatched(model):
            plain = seconds()
        with patched(model, method):
            ratios.append(seconds() / plain)
    return statistics.median(ratios[WARM_UP:])


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
