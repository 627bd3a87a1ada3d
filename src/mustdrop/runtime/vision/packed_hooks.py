"""Hooks before and after the layers of an encoder that runs on some of its patches: see `runtime/vision/packed.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mustdrop.adapters.base import Tower
from mustdrop.compat import eager
from mustdrop.runtime.state import Local
from mustdrop.runtime.vision.packed import Packed


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
