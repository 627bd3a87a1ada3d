"""HyperCLOVA X SEED Vision v2: the tower of Qwen2.5-VL, one more projection, and plain positions in the text model."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Tower
from mustdrop.adapters.qwen2_vl import Qwen25VL, packed_tower
from mustdrop.cost import linear_flops


class HyperClovaXVision(Qwen25VL):
    """`HyperCLOVAXVisionV2ForConditionalGeneration`."""

    name = "hyperclovax_vision_v2"
    classes = ("HyperCLOVAXVisionV2ForConditionalGeneration",)
    token_types: str | None = None

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """`model.model.vision_model`."""
        return packed_tower(model.model.vision_model)

    def projector_flops(self, model: Any) -> int:
        """The merger and the projection."""
        return linear_flops(model.model.vision_model.merger) + linear_flops(model.model.projector)
