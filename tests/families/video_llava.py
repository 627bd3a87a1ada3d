"""Video-LLaVA: one tower for images, one for the frames of videos, which keep their CLS rows."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.video_llava import VideoLlava
from tests.families.base import IMAGE, VIDEO, Family, clip, text, tokens


class VideoLlavaFamily(Family):
    """See `VideoLlava`."""

    of = VideoLlava

    def config(self) -> dict[str, Any]:
        """Two CLIP towers and Llama."""
        return {
            "model_type": "video_llava",
            "vision_config": clip(),
            "text_config": text("llama"),
            **tokens(),
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per image, 37 per frame."""
        if modality == "image":
            known = inspect.signature(model.forward).parameters
            name = next(name for name in self.adapter.media["image"][1] if name in known)
            return {name: stack(images)}, [[IMAGE] * 36 for _ in images]
        return {"pixel_values_videos": stack(images)}, [[VIDEO] * 37 * len(frames) for frames in images]

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One image size; three frames."""
        return ((3, 24, 24),) if modality == "image" else ((3, 3, 24, 24),)
