"""The time of a prompt, pruned and not, in neighbouring runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mustdrop import clock
from mustdrop.fidelity import respond
from mustdrop.method import Method
from mustdrop.patching import patched, unpatched


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

    def answer() -> None:
        respond(model, inputs, 1)

    def plain() -> float:
        with unpatched(model):
            return clock.seconds(model.device, answer)

    def pruned() -> float:
        with patched(model, method):
            return clock.seconds(model.device, answer)

    return clock.median_ratio(pairs, plain, pruned)
