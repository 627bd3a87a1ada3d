"""Video-LLaVA: one tower for images, one for the frames of videos, which keep their CLS rows."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.layout import Layout


class VideoLlava(Adapter):
    """`VideoLlavaForConditionalGeneration`."""

    name = "video_llava"
    classes = ("VideoLlavaForConditionalGeneration",)
    media = {  # noqa: RUF012
        "image": ("get_image_features", ("pixel_values", "pixel_values_images"), "image_token_id"),
        "video": ("get_video_features", ("pixel_values_videos",), "video_token_id"),
    }

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """The image tower or the video tower."""
        return self.dense_tower(model.model.image_tower if modality == "image" else model.model.video_tower)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A square grid per image; per video one grid of frames, with a CLS row before each frame."""
        side = self.encoder_grid(model, modality, arguments)[0]
        if modality == "video":
            videos, frames = arguments["pixel_values_videos"].shape[:2]
            grid = (frames, side, side)
            return [Layout.of_frames(grid, (side, side), i * frames, prefix=1) for i in range(videos)]
        pixels = arguments.get("pixel_values")
        images = arguments["pixel_values_images"] if pixels is None else pixels
        strategy = arguments.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
        prefix = int(strategy == "full")
        return [Layout.of_frames((1, side, side), (side, side), i, prefix=prefix) for i in range(len(images))]
