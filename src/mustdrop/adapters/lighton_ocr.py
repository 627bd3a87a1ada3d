"""LightOnOCR: the Pixtral tower of Mistral 3 under other names, and Qwen3."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Tower
from mustdrop.adapters.mistral3 import Mistral3
from mustdrop.cost import linear_flops


class LightOnOcr(Mistral3):
    """`LightOnOcrForConditionalGeneration`."""

    name = "lighton_ocr"
    classes = ("LightOnOcrForConditionalGeneration",)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """Pixtral: all images in one sequence."""
        tower = model.model.vision_encoder
        return Tower(tower, tower.transformer.layers, packed=True)

    def projector_flops(self, model: Any) -> int:
        """The projection."""
        return linear_flops(model.model.vision_projection)
