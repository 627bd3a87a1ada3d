"""InternVL: tiles of a fixed size, pixel shuffle makes 2 x 2 patches one feature."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.internvl import InternVL
from tests.families.base import IMAGE, Family, text


class InternVLFamily(Family):
    """See `InternVL`."""

    of = InternVL

    def config(self) -> dict[str, Any]:
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

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per tile."""
        return {"pixel_values": stack(images)}, [[IMAGE] * 36 for _ in images]

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One tile."""
        return ((3, 48, 48),)
