"""Mistral 3 (Pixtral tower): images of any size in one sequence under a block mask, 2 x 2 patches to a feature."""

from __future__ import annotations

from typing import Any

import torch

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.layout import Layout


class Mistral3(Adapter):
    """`Mistral3ForConditionalGeneration`."""

    name = "mistral3"
    classes = ("Mistral3ForConditionalGeneration",)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """Pixtral: all images in one sequence."""
        tower = model.model.vision_tower
        return Tower(tower, tower.transformer.layers, packed=True)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per image, without its padding."""
        merge, patch = model.config.spatial_merge_size, model.config.vision_config.patch_size
        found, start = [], 0
        for height, width in torch.as_tensor(arguments["image_sizes"], dtype=torch.long, device="cpu").tolist():
            rows, columns = height // patch, width // patch
            grid = (1, rows // merge, columns // merge)
            one = Layout.of_frames(grid, (rows, columns), pool=merge)
            found.append(Layout(one.grids, one.cells, one.patches + start))
            start += rows * columns
        return found
