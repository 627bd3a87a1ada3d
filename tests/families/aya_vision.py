"""Aya Vision and Command A Vision: SigLIP over square tiles, pixel shuffle behind it, sliding-window Cohere layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.aya_vision import AyaVision, Cohere2Vision
from tests.families.base import IMAGE, Family, siglip, text


class AyaVisionFamily(Family):
    """See `AyaVision`."""

    of = AyaVision

    def config(self) -> dict[str, Any]:
        """Three of five decoder layers see 16 tokens back; the others have no positions."""
        return tiny_cohere("aya_vision", vision_feature_layer=-1, vision_feature_select_strategy="full")

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per tile."""
        return {"pixel_values": stack(images)}, [[IMAGE] * 36 for _ in images]

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One tile."""
        return ((3, 48, 48),)


class Cohere2VisionFamily(AyaVisionFamily):
    """See `Cohere2Vision`."""

    of = Cohere2Vision

    def config(self) -> dict[str, Any]:
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
