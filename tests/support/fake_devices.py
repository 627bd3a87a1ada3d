"""Models spread over imitated devices (`benchmarks.imitated_device`)."""

from __future__ import annotations

from typing import Any

from benchmarks.imitated_device import CPU, FIRST, SECOND, THIRD, Places, put, where
from torch import nn

from mustdrop.adapters import find

__all__ = ["CPU", "FIRST", "SECOND", "THIRD", "Places", "eager_experts", "put", "spread", "where"]


def spread(model: Any) -> Any:
    """Put a model of any family on three devices as a `device_map` does, with accelerate's hooks; only claims move.

    The encoders are on the third device, the decoder layers on all, the head on the second, the rest on the first.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    adapter = find(model)
    layers = adapter.decoder_layers(model)
    homes: dict[nn.Module, Any] = {model: FIRST, model.get_output_embeddings(): SECOND}
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
