"""LLaVA-1.5 and its kin: CLIP or SigLIP tower, two-layer projector, any Llama-like text model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.llava import Llava
from tests.families.base import IMAGE, Family, clip, text


class LlavaFamily(Family):
    """See `Llava`."""

    of = Llava

    def config(self) -> dict[str, Any]:
        """CLIP and Llama."""
        return {
            "model_type": "llava",
            "vision_config": clip(),
            "text_config": text("llama"),
            "image_token_id": IMAGE,
            "image_seq_length": 36,
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per image."""
        return {"pixel_values": stack(images)}, [[IMAGE] * 36 for _ in images]
