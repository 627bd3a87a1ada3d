"""LLaVA-OneVision: tiles as LLaVA-NeXT (resampled where there are many), videos resampled to half the side."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.llava_onevision import LlavaOnevision
from tests.families.base import VIDEO, siglip, text, tokens
from tests.families.llava_next import PINPOINTS, LlavaNextFamily


class LlavaOnevisionFamily(LlavaNextFamily):
    """See `LlavaOnevision`."""

    of = LlavaOnevision

    def config(self) -> dict[str, Any]:
        """SigLIP and Qwen2."""
        return {
            "model_type": "llava_onevision",
            "vision_config": siglip(),
            "text_config": text("qwen2"),
            "image_grid_pinpoints": PINPOINTS,
            **tokens(),
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """9 tokens per frame and one break."""
        if modality == "image":
            return super().media(model, modality, images)
        return {"pixel_values_videos": stack(images)}, [[VIDEO] * (9 * len(frames) + 1) for frames in images]

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Images as LLaVA-NeXT; three frames."""
        return super().sizes(modality) if modality == "image" else ((3, 3, 24, 24),)
