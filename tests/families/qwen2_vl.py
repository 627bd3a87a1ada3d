"""Qwen2-VL, Qwen2.5-VL: images of any size, packed into one sequence, 2 x 2 patches to a feature, M-RoPE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters.qwen2_vl import Qwen2VL, Qwen25VL
from tests.families.base import IMAGE, VIDEO, Family, packed_patches, text, tokens

_START, _END = 502, 503


class Qwen2VLFamily(Family):
    """See `Qwen2VL`."""

    of = Qwen2VL

    def config(self) -> dict[str, Any]:
        """Four blocks, patches of 4 x 4 pixels."""
        vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        return tiny_qwen("qwen2_vl", vision, head_dim=None)

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Packed patches, their grids, and the run of tokens between its markers."""
        made = [packed_patches(image) for image in images]
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        arguments = {
            name: torch.cat([patches for patches, _ in made]),
            f"{modality}_grid_thw": torch.tensor([grid for _, grid in made], dtype=torch.long, device="cpu"),
        }
        token = IMAGE if modality == "image" else VIDEO
        return arguments, [self.run(token, grid[0], grid[1] * grid[2] // 4) for _, grid in made]

    def run(self, token: int, frames: int, per_frame: int) -> list[int]:
        """The ids of one medium in the prompt."""
        return [_START, *[token] * (frames * per_frame), _END]

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Three sizes of image; two or three temporal patches of two frames each."""
        if modality == "image":
            return ((3, 32, 32), (3, 24, 40), (3, 40, 24))
        return ((4, 3, 24, 32), (6, 3, 24, 24))


class Qwen25VLFamily(Qwen2VLFamily):
    """See `Qwen25VL`."""

    of = Qwen25VL

    def config(self) -> dict[str, Any]:
        """Windows of 2 x 2 features; every second block sees everything."""
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        }
        return tiny_qwen("qwen2_5_vl", vision, head_dim=None)


def tiny_qwen(kind: str, vision: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A tiny configuration of a Qwen-VL family."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    decoder = text("", rope_parameters=rotary, **settings)
    del decoder["model_type"]
    packed = {
        "depth": 4,
        "num_heads": 4,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "in_channels": 3,
        "initializer_range": 0.15,
    }
    return {
        "model_type": kind,
        "vision_config": packed | vision,
        "text_config": {name: value for name, value in decoder.items() if value is not None or name == "eos_token_id"},
        "tie_word_embeddings": False,
        **tokens(vision_start_token_id=_START, vision_end_token_id=_END),
    }
