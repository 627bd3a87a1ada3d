"""Mistral 3 (Pixtral tower): images of any size in one sequence under a block mask, 2 x 2 patches to a feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.adapters.tiny import IMAGE, text
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

    def tiny(self) -> dict[str, Any]:
        """Three encoder layers and Mistral."""
        vision = {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 48,
            "patch_size": 4,
            "head_dim": 8,
            "initializer_range": 0.15,
        }
        return {
            "model_type": "mistral3",
            "vision_config": vision,
            "text_config": text("mistral", sliding_window=None),
            "image_token_id": IMAGE,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        }

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Images at the top left of a common canvas, and their sizes."""
        canvas = torch.zeros(len(images), 3, 48, 48, dtype=torch.float32, device="cpu")
        for place, image in zip(canvas, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        sizes = [list(image.shape[1:]) for image in images]
        runs = [[IMAGE] * (height // 8 * (width // 8)) for height, width in sizes]
        return {"pixel_values": canvas, "image_sizes": torch.tensor(sizes, dtype=torch.long, device="cpu")}, runs

    def tiny_sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Square and wide."""
        return ((3, 48, 48), (3, 24, 40))
