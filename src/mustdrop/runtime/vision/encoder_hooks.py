"""Hooks of the layers of an encoder: each hands on to `EncoderStage`, or to `Packed` where only some patches run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mustdrop.adapters.base import Tower
from mustdrop.compat import eager
from mustdrop.runtime.state import Local

if TYPE_CHECKING:
    from mustdrop.runtime.vision.encoder import EncoderStage
    from mustdrop.runtime.vision.packed import Packed


@dataclass
class MaskHook:
    """Pre-hook of the attention module of an encoder layer that takes no mask itself."""

    stage: EncoderStage

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See `EncoderStage.masked`."""
        return self.stage.masked(args[0] if args else kwargs["hidden_states"], module, args, kwargs)


@dataclass
class BlockHook:
    """Pre-hook of one encoder layer.

    Attributes:
        stage: of the encoder.
        index: of the layer.
        layers: how many layers, this one and those without a hook that follow it, see the same sequences.
    """

    stage: EncoderStage
    index: int
    layers: int = 1

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See `EncoderStage.before_block`. Hidden states that come by name are handed on by position."""
        if not args:
            name = parameters(type(module).forward)[1]
            args, kwargs = (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}
        return self.stage.before_block(self.index, module, args, kwargs, self.layers)


@dataclass
class LengthHook:
    """Pre-hook of an encoder layer that only costs (`Tower.before`)."""

    stage: EncoderStage

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `EncoderStage.passed`."""
        self.stage.passed(args[0] if args else kwargs[parameters(type(module).forward)[1]], kwargs)


@dataclass
class PackedHooks:
    """Hooks around the layers of one encoder, for the pass that runs in this thread."""

    local: Local

    def install(self, tower: Tower) -> list[Any]:
        """Register them; returns the handles."""
        if tower.mergers:
            handles = [module.register_forward_hook(self.after_merger) for module in tower.mergers]
        else:
            handles = [tower.blocks[-1].register_forward_hook(self.after_last)]
        if tower.embeds is not None:
            handles.append(tower.embeds.register_forward_pre_hook(self.before_embedding))
            handles.append(tower.embeds.register_forward_hook(self.after_embedding))
        return handles

    @eager
    def before_embedding(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """See `Packed.before_embedding`."""
        packed = self._embedding()
        return None if packed is None else (packed.before_embedding(args[0]), *args[1:])

    @eager
    def after_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """See `Packed.after_embedding`."""
        packed = self._embedding()
        return None if packed is None else packed.after_embedding(output)

    @eager
    def after_merger(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """See `Packed.after_merger`."""
        packed = self._packed()
        return None if packed is None else packed.after_merger(module, output)

    @eager
    def after_last(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """See `Packed.after_last`."""
        packed = self._packed()
        return None if packed is None else packed.after_last(output)

    def _packed(self) -> Packed | None:
        packed = self._pass()
        return None if packed is None or packed.rows is None else packed

    def _embedding(self) -> Packed | None:
        packed = self._pass()
        return None if packed is None or packed.unmade is None else packed

    def _pass(self) -> Packed | None:
        return None if self.local.encoder is None else self.local.encoder.packed


def takes_mask(block: nn.Module) -> bool:
    """Whether an encoder layer hands a mask on to its attention."""
    return "attention_mask" in parameters(type(block).forward)


@functools.cache
def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of a forward; finding them takes longer than what is done with them."""
    return tuple(inspect.signature(function).parameters)
