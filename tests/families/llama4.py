"""Llama 4: square tiles, CLS behind the patches, decoder layers that see their own chunk of the prompt only."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.llama4 import Llama4
from tests.families.base import IMAGE, Family, text, tower


class Llama4Family(Family):
    """See `Llama4`."""

    of = Llama4

    def config(self) -> dict[str, Any]:
        """Every second layer has no rotary embeddings and sees everything; the others see chunks of 16."""
        vision = tower("llama4_vision_model", image_size=48, intermediate_size=128, vision_output_dim=64)
        sizes = {"projector_input_dim": 64, "projector_output_dim": 64}
        experts = {"num_local_experts": 2, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}
        return {
            "model_type": "llama4",
            "vision_config": {**vision, **sizes},
            "text_config": text("llama4_text", attention_chunk_size=16, no_rope_layer_interval=2, **experts),
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per tile."""
        return {"pixel_values": stack(images)}, [[IMAGE] * 36 for _ in images]

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One tile."""
        return ((3, 48, 48),)
