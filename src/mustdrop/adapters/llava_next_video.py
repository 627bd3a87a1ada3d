"""LLaVA-NeXT-Video: images as LLaVA-NeXT; frames of a video are pooled before the projector."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter
from mustdrop.adapters.llava_next import LlavaNext
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
