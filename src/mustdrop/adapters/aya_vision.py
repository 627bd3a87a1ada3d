"""Aya Vision and Command A Vision: SigLIP over square tiles, pixel shuffle behind it, sliding-window Cohere layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.base import Adapter
from mustdrop.adapters.tiny import IMAGE, siglip, text
from mustdrop.layout import Layout


class AyaVision(Adapter):
    """`AyaVisionForConditionalGeneration`."""

    name = "aya_vision"
    classes = ("AyaVisionForConditionalGeneration",)
    refuses_flash = "its sliding window would count what is left instead of positions"

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per tile; the prompt counts every tile as an image."""
        encoder_grid = self.encoder_grid(model, modality, arguments)
        pool = self.pool(model, modality, arguments)
        grid = (1, encoder_grid[0] // pool, encoder_grid[1] // pool)
        return [Layout.of_frames(grid, encoder_grid, i, pool=pool) for i in range(len(arguments["pixel_values"]))]

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """Side of the pixel shuffle."""
        return int(model.config.downsample_factor)

    def tiny(self) -> dict[str, Any]:
        """Three of five decoder layers see 16 tokens back; the others have no positions."""
        return tiny_cohere("aya_vision", vision_feature_layer=-1, vision_feature_select_strategy="full")

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per tile."""
        return {"pixel_values": stack(images)}, [[IMAGE] * 36 for _ in images]

    def tiny_sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One tile."""
        return ((3, 48, 48),)


class Cohere2Vision(AyaVision):
    """`Cohere2VisionForConditionalGeneration`."""

    name = "cohere2_vision"
    classes = ("Cohere2VisionForConditionalGeneration",)

    def tiny(self) -> dict[str, Any]:
        """As Aya Vision."""
        return tiny_cohere("cohere2_vision", alignment_intermediate_size=64)


def tiny_cohere(kind: str, **settings: Any) -> dict[str, Any]:
    """A tiny configuration."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return {
        "model_type": kind,
        "vision_config": siglip(image_size=48),
        "text_config": text("cohere2", sliding_window=16, layer_types=kinds, logit_scale=1.0),
        "image_token_id": IMAGE,
        "downsample_factor": 2,
        "tie_word_embeddings": False,
        **settings,
    }
