"""Mistral 3 (Pixtral tower): images of any size in one sequence under a block mask, 2 x 2 patches to a feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters.mistral3 import Mistral3
from tests.families.base import IMAGE, Family, text


class Mistral3Family(Family):
    """See `Mistral3`."""

    of = Mistral3

    def config(self) -> dict[str, Any]:
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

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Images at the top left of a common canvas, and their sizes."""
        canvas = torch.zeros(len(images), 3, 48, 48, dtype=torch.float32, device="cpu")
        for place, image in zip(canvas, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        sizes = [list(image.shape[1:]) for image in images]
        runs = [[IMAGE] * (height // 8 * (width // 8)) for height, width in sizes]
        return {"pixel_values": canvas, "image_sizes": torch.tensor(sizes, dtype=torch.long, device="cpu")}, runs

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Square and wide."""
        return ((3, 48, 48), (3, 24, 40))
