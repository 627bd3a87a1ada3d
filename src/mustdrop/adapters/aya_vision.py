"""Aya Vision and Command A Vision: SigLIP over square tiles, pixel shuffle after it, sliding-window Cohere layers."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter


class AyaVision(Adapter):
    """`AyaVisionForConditionalGeneration`."""

    name = "aya_vision"
    classes = ("AyaVisionForConditionalGeneration",)
    refuses_flash = "its sliding window would count what is left instead of positions"

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """Side of the pixel shuffle."""
        return int(model.config.downsample_factor)


class Cohere2Vision(AyaVision):
    """`Cohere2VisionForConditionalGeneration`."""

    name = "cohere2_vision"
    classes = ("Cohere2VisionForConditionalGeneration",)
