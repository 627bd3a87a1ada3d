"""ERNIE 4.5 VL: packed patches, pairs of video frames become one, vision tokens have experts of their own."""

from __future__ import annotations

from typing import Any

import torch

from mustdrop.adapters.base import Tower
from mustdrop.adapters.qwen2_vl import Qwen2VL
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout


class Ernie45VLMoe(Qwen2VL):
    """`Ernie4_5_VLMoeForConditionalGeneration`."""

    name = "ernie4_5_vl_moe"
    classes = ("Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VL_MoeForConditionalGeneration")
    row_arguments = ("moe_mm_token_type_ids",)
    experts_of = {"text": "text_moe", "vision": "vision_moe"}  # noqa: RUF012 (a constant of the class)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """One tower for images and videos; its frames are single."""
        tower = model.model.vision_tower
        return Tower(tower, tower.blocks, packed=True, embeds=tower.patch_embed)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """(frames, rows, columns) of features per medium; a feature of a video has patches of two frames."""
        vision = model.config.vision_config
        merge, pair = vision.spatial_merge_size, 1 if modality == "image" else vision.temporal_merge_size
        found, start = [], 0
        for frames, rows, columns in arguments[f"{modality}_grid_thw"].tolist():
            grid = (frames // pair, rows // merge, columns // merge)
            per_frame = grid[1] * grid[2]
            place = start + torch.arange(frames * rows * columns, dtype=torch.long, device="cpu").view(
                grid[0], pair, per_frame, merge * merge
            )
            patches = place.transpose(1, 2).reshape(grid[0] * per_frame, pair * merge * merge)
            found.append(Layout((grid,), torch.arange(len(patches), dtype=torch.long, device="cpu"), patches))
            start += place.numel()
        return found

    def projector_flops(self, model: Any) -> int:
        """The resampler."""
        return linear_flops(model.model.resampler_model)
