"""Kimi K2.5: packed patches in raster order, and a text model whose cache holds compressed keys and values (MLA)."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Tower
from mustdrop.adapters.paddleocr_vl import PaddleOCRVL, packed_frames
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout


class KimiK25(PaddleOCRVL):
    """`Kimi_K25ForConditionalGeneration`, images only: transformers 5.23 cannot split the features of longer videos."""

    name = "kimi_k25"
    since = "5.23"
    classes = ("Kimi_K25ForConditionalGeneration",)
    token_types: str | None = None

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """`model.model.vision_tower`."""
        visual = model.model.vision_tower
        return Tower(visual, visual.layers, packed=True, embeds=visual.patch_embed.proj)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per image."""
        return packed_frames(arguments["image_grid_thw"].tolist(), model.config.vision_config.merge_kernel_size[0])

    def projector_flops(self, model: Any) -> int:
        """The projector."""
        return linear_flops(model.model.mm_projector)
