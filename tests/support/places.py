"""Several devices, imitated on one CPU: tensors carry a claim where they are, and mixing claims is an error.

Real devices refuse to compute on tensors of different devices, and so does this. Everything is computed on the CPU, so
the numbers are those of one device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from mustdrop.adapters import find

CPU = torch.device("cpu")
FIRST, SECOND, THIRD = (torch.device("cuda", i) for i in range(3))
_MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)
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


def _basic(index: Any) -> bool:
    """Whether values put at this index are copied, from whatever device."""
    return not any(isinstance(part, (Tensor, list)) for part in (index if isinstance(index, tuple) else (index,)))


def spread(model: Any) -> Any:
    """Put a model of any family on three devices as a `device_map` does, with accelerate's hooks; only claims move.

    The encoders are on the third device, the decoder layers on all, the head on the second, the rest on the first.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    adapter = find(model)
    layers = adapter.decoder_layers(model)
    homes: dict[nn.Module, torch.device] = {model: FIRST, model.get_output_embeddings(): SECOND}
    if "vision" not in adapter.lacks:
        homes |= {adapter.tower(model, kind).module: THIRD for kind in adapter.media}
    homes |= {layer: (FIRST, SECOND, THIRD)[3 * i // len(layers)] for i, layer in enumerate(layers)}
    places = {module: device for home, device in homes.items() for module in home.modules()}
    for home, device in homes.items():
        put(home, device)
    for module, device in places.items():
        if module in homes or next(module.parameters(), None) is not None:
            hook = AlignDevicesHook(
                execution_device=device, io_same_device=module is model, skip_keys=model._skip_keys_device_placement
            )
            hook.init_hook = lambda module: module
            add_hook_to_module(module, hook)
    return eager_experts(model)


def eager_experts(model: Any) -> Any:
    """Experts one after another; the other implementations choose how to compute by the kind of device."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


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
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            return self._claim(func(*args, **kwargs), where(args[0]))
        if func in _MOVES:
            return self._move(func, args, kwargs)
        here = self._agreed(func, args, kwargs)
        if kwargs.get("device") is not None:
            here, kwargs["device"] = torch.device(kwargs["device"]), "cpu"
        self.seen.add(here)
        return self._claim(func(*args, **kwargs), here)

    def _move(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, rest = args[0], list(args[1:])
        target = where(tensor)
        if func == Tensor.cpu:
            return self._claim(tensor.clone() if target != CPU else tensor, CPU)
        for i, value in enumerate(rest):
            if isinstance(value, (str, torch.device)):
                target, rest[i] = torch.device(value), CPU
            elif isinstance(value, Tensor):
                target = where(value)
        if kwargs.get("device") is not None:
            target, kwargs["device"] = torch.device(kwargs["device"]), CPU
        moved = func(tensor, *rest, **kwargs)
        return self._claim(moved.view_as(moved) if moved is tensor and target != where(tensor) else moved, target)

    @staticmethod
    def _agreed(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.device:
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

    @staticmethod
    def _claim(value: Any, device: torch.device) -> Any:
        if isinstance(value, torch.Size):
            return value

        def claim(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and where(leaf) != device:
                leaf.claimed_place = device
            return leaf

        return tree_map(claim, value)
