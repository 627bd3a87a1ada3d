"""`mustdrop.compile`: the prompt's pass through the language model, captured once for each shape and replayed."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from mustdrop.errors import ConfigError, NotPatchedError, UnsupportedOptionError
from mustdrop.patching import _runtime
from mustdrop.runtime.compile.graphs import Graphs
from mustdrop.runtime.compile.recording import CudaGraphs
from mustdrop.runtime.compile.torch_compile import Compiled

M = TypeVar("M", bound=nn.Module)


def compile(model: M, *, graphs: int = 8, after: int = 2, backend: Any = None) -> M:
    """Capture the prompt's pass through the language model of a patched model; `generate` works as before.

    The pass is recorded as a CUDA graph and replayed, which takes one launch in place of more than a thousand. There is
    a graph for each shape: batch size, lengths, numbers of tokens, types, attention implementation, and all else that
    decides what runs. A prompt that has no graph, and one whose pass cannot be captured (how many tokens stay where
    depends on the data, the cache is cut by what each layer has read, gradients are wanted), runs as it would without;
    why is said once, as a `CaptureWarning`. Results are the same. Where the model's weights move, or hooks or parts of
    its language model change, it is captured anew. Patching it again ends all of this, and so does `unpatch`.

    Args:
        model: a patched model.
        graphs: how many shapes have a graph at the same time; the one that was not used for longest goes first. 0 ends
            what an earlier call has begun.
        after: the prompt of a shape at which it is captured: 1 is the first one, 2 the second.
        backend: a backend of `torch.compile` by name or as a function, in place of CUDA graphs: each shape is then
            compiled once ("inductor" takes minutes for a large model), on any device, and none is forgotten: what
            comes when there are `graphs` of them runs as it would without.

    Returns:
        The same model.

    Raises:
        NotPatchedError: the model is not patched.
        UnsupportedOptionError: it is not on a CUDA device, and no backend is named.
        ConfigError: numbers out of range.
    """
    runtime = _runtime(model)
    if runtime is None:
        raise NotPatchedError(f"this {type(model).__name__} is not patched: call mustdrop.patch(model) first.")
    numbers: tuple[tuple[str, Any, int], ...] = (("graphs", graphs, 0), ("after", after, 1))
    for name, value, least in numbers:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name} must be an int of {least} or more, got {value!r}.")
    device = next(runtime.text.parameters()).device
    if graphs and backend is None and device.type != "cuda":
        raise UnsupportedOptionError(
            f"mustdrop.compile captures CUDA graphs, and the language model is on {str(device)!r}. Move it to a CUDA "
            'device, or name a backend of torch.compile: mustdrop.compile(model, backend="inductor").'
        )
    if runtime.engine is not None:
        runtime.engine.release()
    if not graphs:
        runtime.engine = None
    elif backend is None:
        runtime.engine = Graphs(runtime, CudaGraphs, graphs, after)
    else:
        runtime.engine = Compiled(runtime, backend, graphs, after)
    return model
