"""Aya Vision and Command A Vision: SigLIP over square tiles, pixel shuffle behind it, sliding-window Cohere layers."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter
from mustdrop.layout import Layout


class AyaVision(Adapter):
    """`AyaVisionForConditionalGeneration`."""

    name = "aya_vision"
    classes = ("AyaVisionForConditionalGeneration",)
    refuses_flash = "its sliding window would count what is left instead of positions"

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per tile; the prompt counts every tile as an image."""
        encoder_grid = self.encoder_grid(model, modality, arguments)
        pool = self.pool(model, modality, arguments)
        grid = (1, encoder_grid[0] // pool, encoder_grid[1] // pool)
        return [Layout.of_frames(grid, encoder_grid, i, pool=pool) for i in range(len(arguments["pixel_values"]))]

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """Side of the pixel shuffle."""
        return int(model.config.downsample_factor)


class Cohere2Vision(AyaVision):
    """`Cohere2VisionForConditionalGeneration`."""

    name = "cohere2_vision"
    classes = ("Cohere2VisionForConditionalGeneration",)
