"""Recording what a function of tensors does, to do it again on the same storage without running any of its Python."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: From inputs to outputs; called several times, and whatever it does besides must not matter.
Run = Callable[[Sequence[Tensor]], list[Tensor]]

_WARM_UP = 2  # kernels are loaded and workspaces allocated before anything is recorded


class Captured(abc.ABC):
    """One recording."""

    @abc.abstractmethod
    def replay(self) -> Sequence[Tensor]:
        """Do again what was recorded, on what its inputs hold now; the outputs are overwritten by the next replay."""

    @abc.abstractmethod
    def begin(self) -> None:
        """Somebody is about to write to the inputs."""

    @abc.abstractmethod
    def end(self) -> None:
        """Nobody will read the outputs of this replay any more."""


class Capturer(abc.ABC):
    """Makes recordings."""

    @abc.abstractmethod
    def capture(self, run: Run, inputs: Sequence[Tensor]) -> Captured:
        """Record `run(inputs)`.

        Args:
            run: see `Run`.
            inputs: stay where they are; a replay reads what they hold then.

        Raises:
            Exception: `run` cannot be recorded. It has left nothing behind.
        """


class CudaGraphs(Capturer):
    """Recordings as CUDA graphs: one launch for the whole pass.

    All of them share a pool of memory. That is safe because outputs are copied before anything is replayed again.
    """

    def __init__(self) -> None:
        self.pool: Any = None

    def capture(self, run: Run, inputs: Sequence[Tensor]) -> Captured:
        """See `Capturer.capture`. What waits for the device, or copies from the host, makes it fail."""
        device = inputs[0].device
        with torch.cuda.device(device):
            self._warm_up(run, inputs, device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                outputs = run(inputs)
        if self.pool is None:
            self.pool = graph.pool()
        return _CudaGraph(graph, outputs, device)

    @staticmethod
    def _warm_up(run: Run, inputs: Sequence[Tensor], device: torch.device) -> None:
        """On a stream of its own, as torch asks for."""
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                run(inputs)
        current.wait_stream(side)


class _CudaGraph(Captured):
    """A CUDA graph and its outputs."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: list[Tensor], device: torch.device) -> None:
        self.graph, self.outputs, self.device = graph, outputs, device
        self.read: torch.cuda.Event | None = None

    def replay(self) -> Sequence[Tensor]:
        """See `Captured.replay`."""
        with torch.cuda.device(self.device):
            self.graph.replay()
        return self.outputs

    def begin(self) -> None:
        """The stream of this thread waits for what another one still reads."""
        if self.read is not None:
            torch.cuda.current_stream(self.device).wait_event(self.read)

    def end(self) -> None:
        """See `Captured.end`."""
        self.read = torch.cuda.current_stream(self.device).record_event()
