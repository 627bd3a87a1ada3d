"""Reading queries and keys of one attention call without `output_attentions`.

An attention module looks up its function by `self.config._attn_implementation` at every call. While a model is patched,
the modules that may be read have a proxy in place of their config. It answers like the config itself; only while a
capture is wanted, in this thread, does it name a function that calls the model's own attention and then hands over q
and k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mustdrop.compat import attention_function, attention_registry, eager
from mustdrop.runtime.state import Local

Capture = Callable[[nn.Module, Tensor, Tensor, Tensor | None, dict[str, Any]], None]

_PREFIX = "mustdrop_"
_STRAIGHT = "mustdrop:straight"


class ConfigProxy:
    """A module's config, plus a capture point.

    Attributes:
        real: the config of the module.
        key: what `local.capture` must hold for the capture to happen.
    """

    def __init__(self, real: Any, key: object, local: Local, capture: Capture) -> None:
        self.__dict__.update(real=real, key=key, local=local, capture=capture)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "real" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)

    @property
    def _attn_implementation(self) -> Any:
        straight = self.local.straight
        if straight is not None:
            return _STRAIGHT if straight.wanted == self.key else self.real._attn_implementation
        if torch.compiler.is_compiling() and self.local.capture is None:
            return self.real._attn_implementation  # nothing to do, and nothing that breaks a graph
        return self._implementation()

    @eager
    def _implementation(self) -> Any:
        name = self.real._attn_implementation
        if self.local.inside or self.local.capture != self.key:
            return name
        tapped = _PREFIX + str(name or "eager")
        registry = attention_registry()
        if tapped not in registry:
            registry.register(tapped, _captured_attention)
        return tapped


@eager
def _captured_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The model's own attention, then the capture. Registered under names that only a wanted capture returns."""
    proxy: Any = module.config
    local: Local = proxy.local
    local.inside, local.capture = True, None
    if "scaling" in kwargs and kwargs["scaling"] is None:  # a default that not every eager function knows
        kwargs["scaling"] = q.shape[-1] ** -0.5
    try:
        out = attention_function(module, proxy.real._attn_implementation)(
            module, q, k, v, attention_mask, *args, **kwargs
        )
    finally:
        local.inside = False
    proxy.capture(module, q, k, attention_mask, kwargs)
    return out


def register() -> None:
    """Make the function known that reads in a straight pass."""
    if _STRAIGHT not in attention_registry():
        attention_registry().register(_STRAIGHT, _read_straight)


def _read_straight(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """The model's own attention, then what the straight pass reads of it."""
    straight: Any = module.config.local.straight
    i = straight.reads_now()
    if "scaling" in kwargs and kwargs["scaling"] is None:  # a default that not every eager function knows
        kwargs["scaling"] = q.shape[-1] ** -0.5
    out = straight.functions[i](module, q, k, v, attention_mask, *args, **kwargs)
    straight.read(i, module, q, k, attention_mask, kwargs)
    return out


def install(module: nn.Module, key: object, local: Local, capture: Capture) -> None:
    """Put a capture point on an attention module."""
    module.config = ConfigProxy(module.config, key, local, capture)  # type: ignore[assignment]


def remove(module: nn.Module) -> None:
    """Give the module its config back."""
    if isinstance(module.config, ConfigProxy):
        module.config = module.config.real


def attention_of(block: nn.Module) -> nn.Module | None:
    """The attention module of an encoder or decoder layer, or None."""
    for name in ("self_attn", "attention", "attn"):
        module = getattr(block, name, None)
        if isinstance(module, nn.Module) and hasattr(module, "config"):
            return module
    return None


def implementation_of(block: nn.Module) -> str:
    """Name of the attention implementation of an encoder or decoder layer, without a capture point's."""
    config: Any = getattr(attention_of(block) or block, "config", block)
    real = config.real if isinstance(config, ConfigProxy) else config
    return str(getattr(real, "_attn_implementation", None) or "eager")
