"""ERNIE 4.5 VL: packed patches, pairs of video frames become one, vision tokens have experts of their own."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.adapters.base import Tower
from mustdrop.adapters.qwen2_vl import Qwen2VL, tiny_qwen
from mustdrop.adapters.tiny import IMAGE, VIDEO
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout

_START, _END, _VIDEO_START, _VIDEO_END = 502, 503, 504, 505


class Ernie45VLMoe(Qwen2VL):
    """`Ernie4_5_VLMoeForConditionalGeneration`."""

    name = "ernie4_5_vl_moe"
    classes = ("Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VL_MoeForConditionalGeneration")
    row_arguments = ("moe_mm_token_type_ids",)
    experts_of = {"text": "text_moe", "vision": "vision_moe"}  # noqa: RUF012 (a constant of the class)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """One tower for images and videos; its frames are single."""
        tower = model.model.vision_tower
        return Tower(tower, tower.blocks, packed=True)

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

    def tiny(self) -> dict[str, Any]:
        """Four experts for text and four for vision, after one dense layer."""
        vision = {"hidden_size": 32, "intermediate_size": 64, "temporal_merge_size": 2}
        experts = {"moe_intermediate_size": [32, 24], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
        made = tiny_qwen("ernie4_5_vl_moe", vision, **experts)
        made["text_config"]["rope_parameters"]["mrope_section"] = [3, 3, 2]
        del made["vision_config"]["temporal_patch_size"], made["vision_start_token_id"], made["vision_end_token_id"]
        markers = {"image_start_token_id": _START, "image_end_token_id": _END}
        return {**made, **markers, "video_start_token_id": _VIDEO_START, "video_end_token_id": _VIDEO_END}

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Packed patches of single frames."""
        token, pair = (IMAGE, 1) if modality == "image" else (VIDEO, 2)
        start, end = (_START, _END) if modality == "image" else (_VIDEO_START, _VIDEO_END)
        pixels, grids = [], []
        for image in images:
            frames = image[None] if image.ndim == 3 else image
            pixels.append(rearrange(frames, "t c (h a p) (w b q) -> (t h w a b) (c p q)", a=2, b=2, p=4, q=4))
            grids.append([len(frames), frames.shape[-2] // 4, frames.shape[-1] // 4])
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        arguments = {
            name: torch.cat(pixels),
            f"{modality}_grid_thw": torch.tensor(grids, dtype=torch.long, device="cpu"),
        }
        return arguments, [[start, *[token] * (t * h * w // 4 // pair), end] for t, h, w in grids]

    def tiny_types(self, kinds: Tensor) -> dict[str, Tensor]:
        """The experts see the markers of an image as vision, too."""
        beside = torch.nn.functional.max_pool1d(kinds[:, None].float(), 3, 1, 1)[:, 0].long()
        return {**super().tiny_types(kinds), "moe_mm_token_type_ids": beside}
