"""ViP-LLaVA: LLaVA whose features are several encoder layers side by side, without their CLS rows."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter
from mustdrop.adapters.llava import Llava
from mustdrop.layout import Layout

#: The setting for the layers, which transformers 5.23 renamed.
_NAMES = ("vision_feature_layer", "vision_feature_layers")


class VipLlava(Llava):
    """`VipLlavaForConditionalGeneration`."""

    name = "vipllava"
    classes = ("VipLlavaForConditionalGeneration",)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A square grid per image; the model has no setting that keeps the CLS row."""
        return Adapter.layouts(self, model, modality, arguments)

    def read_layers(self, model: Any, modality: str, arguments: dict[str, Any]) -> tuple[int, ...]:
        """All of the layers, whose outputs are put side by side."""
        name = next(n for n in _NAMES if hasattr(model.config, n))
        layers = arguments.get(name) or getattr(model.config, name)
        depth = len(self.tower(model, modality).blocks)
        return tuple(k - 1 if k >= 0 else depth + k for k in ([layers] if isinstance(layers, int) else layers))
