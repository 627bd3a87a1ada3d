"""Ovis 2: an encoder with a head that makes each feature a mixture of rows of a table of visual words."""

from __future__ import annotations

from typing import Any

import torch

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout


class Ovis2(Adapter):
    """`Ovis2ForConditionalGeneration`."""

    name = "ovis2"
    classes = ("Ovis2ForConditionalGeneration",)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """What comes before the head, which needs every patch."""
        return self.dense_tower(model.model.vision_tower.transformer)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per tile; the prompt counts every tile as an image.

        Sides that the stride does not divide are filled up with zeros, so the last features hold fewer patches.
        """
        rows, columns = self.encoder_grid(model, modality, arguments)
        stride = model.config.vision_config.hidden_stride
        grid = (1, -(-rows // stride), -(-columns // stride))
        found = []
        for i in range(len(arguments["pixel_values"])):
            patch = (
                torch.arange(rows * columns, dtype=torch.long, device="cpu").view(rows, columns) + i * rows * columns
            )
            patch = torch.nn.functional.pad(patch, (0, -columns % stride, 0, -rows % stride), value=-1)
            patch = patch.view(grid[1], stride, grid[2], stride).transpose(1, 2).reshape(-1, stride * stride)
            found.append(Layout((grid,), torch.arange(len(patch), dtype=torch.long, device="cpu"), patch))
        return found

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int | None:
        """The stride; None where it does not divide the sides."""
        stride = int(model.config.vision_config.hidden_stride)
        return None if any(side % stride for side in self.encoder_grid(model, modality, arguments)) else stride

    def projector_flops(self, model: Any) -> int:
        """The head and the table."""
        return linear_flops(model.model.vision_tower.head_linear) + 2 * int(
            model.model.visual_embeddings_table.weight.numel()
        )
