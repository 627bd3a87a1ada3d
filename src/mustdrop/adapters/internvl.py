"""InternVL: tiles of a fixed size, pixel shuffle makes 2 x 2 patches one feature."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.layout import Layout


class InternVL(Adapter):
    """`InternVLForConditionalGeneration`."""

    name = "internvl"
    classes = ("InternVLForConditionalGeneration",)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """InternViT has a CLS token."""
        found = self.dense_tower(model.model.vision_tower)
        return Tower(found.module, found.blocks, 1, True)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per tile; the prompt counts every tile as an image."""
        encoder_grid = self.encoder_grid(model, modality, arguments)
        pool = self.pool(model, modality, arguments)
        grid = (1, encoder_grid[0] // pool, encoder_grid[1] // pool)
        return [Layout.of_frames(grid, encoder_grid, i, pool=pool) for i in range(len(arguments["pixel_values"]))]

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """The inverse of the pixel shuffle's ratio."""
        side: float = 1 / model.config.downsample_ratio
        return round(side)
