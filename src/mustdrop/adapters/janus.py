"""Janus and DeepSeek-VL, understanding images: an aligner between a SigLIP-like tower and Llama, no pooling.

Janus also draws; that path makes no vision tokens to drop and runs as before.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.adapters.tiny import IMAGE, siglip, text
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout


class DeepseekVL(Adapter):
    """`DeepseekVLForConditionalGeneration`."""

    name = "deepseek_vl"
    classes = ("DeepseekVLForConditionalGeneration",)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """`model.model.vision_model`, without CLS."""
        return self.dense_tower(model.model.vision_model)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A square grid per image."""
        encoder_grid = self.encoder_grid(model, modality, arguments)
        images = range(arguments["pixel_values"].flatten(0, -4).shape[0])
        return [Layout.of_frames((1, *encoder_grid), encoder_grid, i) for i in images]

    def projector_flops(self, model: Any) -> int:
        """The aligner."""
        return linear_flops(model.model.aligner)

    def tiny(self) -> dict[str, Any]:
        """SigLIP and Llama."""
        return {
            "model_type": "deepseek_vl",
            "vision_config": siglip(),
            "text_config": text("llama"),
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        }

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per image."""
        return {"pixel_values": stack(images)}, [[IMAGE] * 36 for _ in images]


class Janus(DeepseekVL):
    """`JanusForConditionalGeneration`."""

    name = "janus"
    classes = ("JanusForConditionalGeneration",)

    def tiny(self) -> dict[str, Any]:
        """With the smallest of image tokenizers."""
        vision = {**siglip(), "model_type": "janus_vision_model", "mlp_ratio": 2, "projection_dim": 64}
        del vision["vision_use_head"], vision["intermediate_size"]
        drawing = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32}
        sizes = {"channel_multiplier": [1], "num_res_blocks": 1, "num_patches": 4, "projection_dim": 64}
        return {
            **super().tiny(),
            "model_type": "janus",
            "vision_config": vision,
            "vq_config": {**drawing, **sizes, "image_token_embed_dim": 64},
        }
