"""InternVL: tiles of a fixed size, pixel shuffle makes 2 x 2 patches one feature."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.adapters.tiny import IMAGE, text
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

    def tiny(self) -> dict[str, Any]:
        """Three encoder layers and Qwen2."""
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": [48, 48],
            "patch_size": [4, 4],
            "initializer_range": 0.15,
        }
        return {
            "model_type": "internvl",
            "vision_config": vision,
            "text_config": text("qwen2"),
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        }

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per tile."""
        return {"pixel_values": stack(images)}, [[IMAGE] * 36 for _ in images]

    def tiny_sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One tile."""
        return ((3, 48, 48),)
