"""What a straight pass is known by, and passes that run by what was made for that: the base of both engines."""

from __future__ import annotations

import abc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop.errors import UnsupportedOptionError
from mustdrop.kernels.dispatch import chosen
from mustdrop.runtime.compile.engine import Engine, Passed, through
from mustdrop.runtime.compile.nested import apart
from mustdrop.runtime.compile.watch import Watch
from mustdrop.runtime.language.straight_pass import Straight

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime

_COUNTED = 1024  # shapes whose prompts are counted


def key_of(straight: Straight, kwargs: dict[str, Any], tensors: list[Tensor]) -> Hashable:
    """Everything that a pass depends on but the values of `tensors`, which are appended, and what `Watch` watches.

    Raises:
        UnsupportedOptionError: it depends on something that has no form.
    """
    form = apart([kwargs, straight.facts()], tensors)
    return form, straight.inner is None, tuple(straight.functions.items()), _surroundings(straight)


def _surroundings(straight: Straight) -> Hashable:
    """Switches of torch and of mustdrop that decide which kernels run, and in which type."""
    device = straight.vision.device.type
    cuda: Any = torch.backends.cuda
    return (
        straight.runtime.implementation,
        chosen(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        *(getattr(cuda, f"{kernel}_sdp_enabled")() for kernel in ("flash", "mem_efficient", "math", "cudnn")),
    )


def obstacle(straight: Straight) -> str | None:
    """Why a pass cannot be compiled or recorded now, None if it can."""
    if torch.is_grad_enabled():
        return "gradients are wanted: run it under torch.no_grad() (generate does)"
    if straight.runtime.text.training:
        return "the model is in training mode: call model.eval()"
    return None


class Keyed(Engine):
    """Runs passes by what was made for their key; the first `after - 1` of each key, and what has none, as they are.

    Attributes:
        graphs: how many keys there may be something for.
        after: the time of its coming at which a key gets it.
        refused: keys for which it could not be made.
        counts: how often each key has come, of the newest ones.
    """

    def __init__(self, runtime: Runtime, graphs: int, after: int) -> None:
        super().__init__()
        self.runtime, self.graphs, self.after = runtime, graphs, after
        self.refused: set[Hashable] = set()
        self.counts: OrderedDict[Hashable, int] = OrderedDict()
        self.lock = threading.Lock()
        self.watch: Watch | None = None

    def run(self, straight: Straight, function: Callable[..., Any], kwargs: dict[str, Any]) -> Passed:
        """See `through`."""
        tensors = list[Tensor]()
        why = obstacle(straight)
        if why is not None:
            self.say(why)
            return through(straight, function, kwargs)
        try:
            key = key_of(straight, kwargs, tensors)
        except UnsupportedOptionError as error:
            self.say(str(error))
            return through(straight, function, kwargs)
        with self.lock:
            made = self._made(key, tensors, straight, function, kwargs) if self._is_due(key) else None
        return through(straight, function, kwargs) if made is None else made

    @abc.abstractmethod
    def _made(
        self,
        key: Hashable,
        tensors: Sequence[Tensor],
        straight: Straight,
        function: Callable[..., Any],
        kwargs: dict[str, Any],
    ) -> Passed | None:
        """The pass by what is there for its key, or is made now; None if it cannot be."""

    def _is_due(self, key: Hashable) -> bool:
        if key in self.refused:
            return False
        times = self.counts.pop(key, 0) + 1
        self.counts[key] = times
        if len(self.counts) > _COUNTED:
            self.counts.popitem(last=False)
        return times >= self.after

    def _refuse(self, key: Hashable, error: Exception) -> None:
        if len(self.refused) >= _COUNTED:
            self.refused.clear()
        self.refused.add(key)
        first = (str(error).strip() or "no message").splitlines()[0]
        self.say(f"it could not be captured ({type(error).__name__}: {first})")
