"""A stand-in for CUDA graphs that runs on a CPU: what a pass did to tensors is recorded, and done again without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.utils import import_utils

import mustdrop
from mustdrop.patching import _runtime
from mustdrop.runtime.compile.graphs import Graphs
from mustdrop.runtime.compile.recording import Captured, Capturer, Run


class Recorder(Capturer):
    """Records by `make_fx`; numbers that the pass asks of the device become part of the recording, as in a graph.

    Attributes:
        made: recordings, in the order in which they were made.
    """

    def __init__(self) -> None:
        self.made: list[Recording] = []

    def capture(self, run: Run, inputs: Sequence[Tensor]) -> Captured:
        run(inputs)  # warm-up
        with pytest.MonkeyPatch.context() as patch:  # transformers asks, and looks at no mask then
            patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
            graph = make_fx(lambda *own: run(own))(*inputs)
        self.made.append(Recording(graph, inputs))
        return self.made[-1]


class Recording(Captured):
    """A graph of operations; its outputs always lie in the same storage, full of NaN where nobody should look."""

    def __init__(self, graph: Any, inputs: Sequence[Tensor]) -> None:
        self.graph, self.inputs, self.replays = graph, inputs, 0
        self.outputs = [torch.empty_like(x) for x in graph(*inputs)]
        self.end()

    def replay(self) -> Sequence[Tensor]:
        self.replays += 1
        for own, new in zip(self.outputs, self.graph(*self.inputs), strict=True):
            own.copy_(new)
        return self.outputs

    def begin(self) -> None:
        """Nothing runs beside."""

    def end(self) -> None:
        for own in self.outputs:
            own.fill_(torch.nan if own.is_floating_point() else 1)


def record(model: Any, graphs: int = 8, after: int = 1) -> Graphs:
    """What `mustdrop.compile` does on a CUDA device, with this stand-in; returns the engine."""
    runtime = _runtime(model)
    assert runtime is not None
    mustdrop.compile(model, graphs=0)
    runtime.engine = Graphs(runtime, Recorder, graphs, after)
    return runtime.engine
