"""LLaVA-NeXT-Video: images as LLaVA-NeXT; frames of a video are pooled before the projector."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.base import Adapter
from mustdrop.adapters.llava_next import PINPOINTS, LlavaNext
from mustdrop.adapters.tiny import VIDEO, clip, text, tokens
from mustdrop.layout import Layout


class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`."""

    name = "llava_next_video"
    classes = ("LlavaNextVideoForConditionalGeneration",)
    media = {  # noqa: RUF012
        **Adapter.media,
        "video": ("get_video_features", ("pixel_values_videos",), "video_token_id"),
    }

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """Images as in LLaVA-NeXT, videos as pooled frames."""
        if modality == "image":
            return super().layouts(model, modality, arguments)
        side, pool = self.encoder_grid(model, modality, arguments)[0], model.config.spatial_pool_stride
        videos, frames = arguments["pixel_values_videos"].shape[:2]
        grid = (frames, side // pool, side // pool)
        return [Layout.of_frames(grid, (side, side), i * frames, pool=pool) for i in range(videos)]

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """The stride of the pooling, for videos."""
        return int(model.config.spatial_pool_stride) if modality == "video" else 1

    def tiny(self) -> dict[str, Any]:
        """CLIP and Llama."""
        return {
            "model_type": "llava_next_video",
            "vision_config": clip(),
            "text_config": text("llama"),
            "image_grid_pinpoints": PINPOINTS,
            **tokens(),
        }

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """9 tokens per frame."""
        if modality == "image":
            return super().tiny_media(model, modality, images)
        return {"pixel_values_videos": stack(images)}, [[VIDEO] * 9 * len(frames) for frames in images]

    def tiny_sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Images as LLaVA-NeXT; three frames."""
        return super().tiny_sizes(modality) if modality == "image" else ((3, 3, 24, 24),)
