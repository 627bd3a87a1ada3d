"""InternVL: tiles of a fixed size, pixel shuffle makes 2 x 2 patches one feature."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter, Tower


class InternVL(Adapter):
    """`InternVLForConditionalGeneration`."""

    name = "internvl"
    classes = ("InternVLForConditionalGeneration",)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """InternViT has a CLS token."""
        found = self.dense_tower(model.model.vision_tower)
        return Tower(found.module, found.blocks, 1, True)

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """The inverse of the pixel shuffle's ratio."""
        side: float = 1 / model.config.downsample_ratio
        return round(side)
