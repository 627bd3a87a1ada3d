"""Janus and DeepSeek-VL, understanding images: an aligner between a SigLIP-like tower and Llama, no pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.janus import DeepseekVL, Janus
from tests.families.base import IMAGE, Family, siglip, text


class DeepseekVLFamily(Family):
    """See `DeepseekVL`."""

    of = DeepseekVL

    def config(self) -> dict[str, Any]:
        """SigLIP and Llama."""
        return {
            "model_type": "deepseek_vl",
            "vision_config": siglip(),
            "text_config": text("llama"),
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per image."""
        return {"pixel_values": stack(images)}, [[IMAGE] * 36 for _ in images]


class JanusFamily(DeepseekVLFamily):
    """See `Janus`."""

    of = Janus

    def config(self) -> dict[str, Any]:
        """With the smallest of image tokenizers."""
        vision = {**siglip(), "model_type": "janus_vision_model", "mlp_ratio": 2, "projection_dim": 64}
        del vision["vision_use_head"], vision["intermediate_size"]
        drawing = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32}
        sizes = {"channel_multiplier": [1], "num_res_blocks": 1, "num_patches": 4, "projection_dim": 64}
        return {
            **super().config(),
            "model_type": "janus",
            "vision_config": vision,
            "vq_config": {**drawing, **sizes, "image_token_embed_dim": 64},
        }
