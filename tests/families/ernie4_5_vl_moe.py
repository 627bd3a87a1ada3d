"""ERNIE 4.5 VL: packed patches, pairs of video frames become one, vision tokens have experts of their own."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.adapters.ernie4_5_vl_moe import Ernie45VLMoe
from tests.families.base import IMAGE, VIDEO
from tests.families.qwen2_vl import Qwen2VLFamily, tiny_qwen

_START, _END, _VIDEO_START, _VIDEO_END = 502, 503, 504, 505


class Ernie45VLMoeFamily(Qwen2VLFamily):
    """See `Ernie45VLMoe`."""

    of = Ernie45VLMoe

    def config(self) -> dict[str, Any]:
        """Four experts for text and four for vision, after one dense layer."""
        vision = {"hidden_size": 32, "intermediate_size": 64, "temporal_merge_size": 2}
        experts = {"moe_intermediate_size": [32, 24], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
        made = tiny_qwen("ernie4_5_vl_moe", vision, **experts)
        made["text_config"]["rope_parameters"]["mrope_section"] = [3, 3, 2]
        del made["vision_config"]["temporal_patch_size"], made["vision_start_token_id"], made["vision_end_token_id"]
        markers = {"image_start_token_id": _START, "image_end_token_id": _END}
        return {**made, **markers, "video_start_token_id": _VIDEO_START, "video_end_token_id": _VIDEO_END}

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
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

    def types(self, kinds: Tensor) -> dict[str, Tensor]:
        """The experts see the markers of an image as vision, too."""
        beside = torch.nn.functional.max_pool1d(kinds[:, None].float(), 3, 1, 1)[:, 0].long()
        return {**super().types(kinds), "moe_mm_token_type_ids": beside}
