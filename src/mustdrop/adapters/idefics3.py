"""Idefics3 and SmolVLM: images and their tiles per row of the batch, pixel shuffle before the text model."""

from __future__ import annotations

from typing import Any

from torch import nn

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout


class Idefics3(Adapter):
    """`Idefics3ForConditionalGeneration`."""

    name = "idefics3"
    classes = ("Idefics3ForConditionalGeneration",)

    def text(self, model: Any) -> nn.Module:
        """`model.model.text_model`."""
        return model.model.text_model  # type: ignore[no-any-return]

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """`model.model.vision_model`."""
        return self.dense_tower(model.model.vision_model)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """One medium per row of the batch: its images and tiles, one grid each; images of zeros are padding."""
        encoder_grid = self.encoder_grid(model, modality, arguments)
        pool = self.pool(model, modality, arguments)
        grid = (1, encoder_grid[0] // pool, encoder_grid[1] // pool)
        found, first = [], 0
        for count in (arguments["pixel_values"] != 0).flatten(2).any(-1).sum(1).tolist():
            parts = [Layout.of_frames(grid, encoder_grid, first + i, pool=pool) for i in range(count)]
            found.append(Layout.join(parts))
            first += count
        return found

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """Side of the pixel shuffle."""
        return int(model.config.scale_factor)

    def projector_flops(self, model: Any) -> int:
        """The connector."""
        return linear_flops(model.model.connector)


class SmolVLM(Idefics3):
    """`SmolVLMForConditionalGeneration`."""

    name = "smolvlm"
    classes = ("SmolVLMForConditionalGeneration",)
