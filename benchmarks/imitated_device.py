"""Devices imitated on one CPU: tensors carry a claim where they are, and mixing claims is an error.

Real devices refuse to compute on tensors of different devices, and so does this. Everything is computed on the CPU, so
the numbers are those of one device. `benchmarks.launches` counts what would have run where; the tests spread models
over several such devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
FIRST, SECOND, THIRD = (torch.device("cuda", i) for i in range(3))
MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)
_READS_SHAPES = (Tensor.expand, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as)  # of tensors anywhere
_MAKES = (torch.arange, torch.empty, torch.full, torch.linspace, torch.ones, torch.zeros)  # on the CPU, unless told
_COPIES = (Tensor.copy_,)
_TAKES_CPU_INDICES = (Tensor.__getitem__, Tensor.__setitem__)
_ASKS = {Tensor.is_cuda.__get__: "cuda", Tensor.is_cpu.__get__: "cpu"}  # type: ignore[attr-defined]


def where(tensor: Tensor) -> torch.device:
    """The device that a tensor claims to be on."""
    return getattr(tensor, "claimed_place", CPU)


def put(module: nn.Module, device: torch.device | str) -> None:
    """Claim all weights of `module` for a device."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.claimed_place = torch.device(device)


def claim(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it claimed for `device`."""
    if isinstance(value, torch.Size):
        return value

    def mark(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and where(leaf) != device:
            leaf.claimed_place = device
        return leaf

    return tree_map(mark, value)


def asks(func: Any) -> bool:
    """Whether a torch function only asks where a tensor is, or reads an attribute: nothing is computed."""
    return func in _ASKS or getattr(func, "__name__", "") in ("__get__", "__set__")


def agreed(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Where a torch function computes.

    Raises:
        RuntimeError: its tensors lie on several devices, as torch would say.
    """
    if func in _MAKES:
        return CPU
    if func in _READS_SHAPES or func in _COPIES or (func == Tensor.__setitem__ and _basic(args[1])):
        return where(args[0])
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if func in _TAKES_CPU_INDICES and tensors and where(tensors[0]) != CPU:
        tensors = [tensors[0], *(t for t in tensors[1:] if where(t) != CPU)]
    places = {where(t) for t in tensors if t.dim() or where(t) != CPU}
    if len(places) > 1:
        shapes = [(tuple(t.shape), str(where(t))) for t in tensors]
        name = getattr(func, "__name__", func)
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {shapes}")
    return places.pop() if places else CPU


class Places(TorchFunctionMode):
    """While active, every torch function checks and passes on the claims."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.device] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return where(args[0])
        if func in _ASKS:
            return where(args[0]).type == _ASKS[func]
        if asks(func):
            return claim(func(*args, **kwargs), where(args[0]))
        if func in MOVES:
            return self._move(func, args, kwargs)
        here = agreed(func, args, kwargs)
        if kwargs.get("device") is not None:
            here, kwargs["device"] = torch.device(kwargs["device"]), "cpu"
        self.seen.add(here)
        return self._run(func, args, kwargs, here)

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any], here: torch.device) -> Any:
        """Compute on `here`."""
        return claim(func(*args, **kwargs), here)

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """`to`, `cpu` and `cuda`: the target is claimed, the type is converted."""
        tensor, rest = args[0], list(args[1:])
        target = where(tensor)
        if func == Tensor.cpu:
            return claim(tensor.clone() if target != CPU else tensor, CPU)
        for i, value in enumerate(rest):
            if isinstance(value, (str, torch.device)):
                target, rest[i] = torch.device(value), CPU
            elif isinstance(value, Tensor):
                target = where(value)
        if kwargs.get("device") is not None:
            target, kwargs["device"] = torch.device(kwargs["device"]), CPU
        moved = func(tensor, *rest, **kwargs)
        return claim(moved.view_as(moved) if moved is tensor and target != where(tensor) else moved, target)


def _basic(index: Any) -> bool:
    """Whether values put at this index are copied, from whatever device."""
    return not any(isinstance(part, (Tensor, list)) for part in (index if isinstance(index, tuple) else (index,)))
