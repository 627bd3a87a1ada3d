"""LLaVA-NeXT-Video: images as LLaVA-NeXT; frames of a video are pooled before the projector."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.llava_next_video import LlavaNextVideo
from tests.families.base import VIDEO, clip, text, tokens
from tests.families.llava_next import PINPOINTS, LlavaNextFamily


class LlavaNextVideoFamily(LlavaNextFamily):
    """See `LlavaNextVideo`."""

    of = LlavaNextVideo

    def config(self) -> dict[str, Any]:
        """CLIP and Llama."""
        return {
            "model_type": "llava_next_video",
            "vision_config": clip(),
            "text_config": text("llama"),
            "image_grid_pinpoints": PINPOINTS,
            **tokens(),
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """9 tokens per frame."""
        if modality == "image":
            return super().media(model, modality, images)
        return {"pixel_values_videos": stack(images)}, [[VIDEO] * 9 * len(frames) for frames in images]

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Images as LLaVA-NeXT; three frames."""
        return super().sizes(modality) if modality == "image" else ((3, 3, 24, 24),)
