"""GLM-4.1V, 4.5V, 4.6V and GLM-OCR: packed patches as in Qwen-VL; images and videos share one placeholder token."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.glm4v import Glm4v, Glm4vMoe, Glm46V, GlmOcr
from tests.families.base import IMAGE
from tests.families.qwen2_vl import Qwen2VLFamily, tiny_qwen

_START, _END, _VIDEO_START, _VIDEO_END = 502, 503, 504, 505


class Glm4vFamily(Qwen2VLFamily):
    """See `Glm4v`."""

    of = Glm4v

    def config(self) -> dict[str, Any]:
        """Four blocks."""
        return tiny_glm("glm4v", {"head_dim": None})

    def run(self, token: int, frames: int, per_frame: int) -> list[int]:
        """Each frame of a video lies between the markers of an image, and a timestamp follows it."""
        if frames == 1:
            return [_START, *[IMAGE] * per_frame, _END]
        run = [_VIDEO_START]
        for t in range(frames):
            run += [_START, *[IMAGE] * per_frame, _END, 10 + t]
        return [*run, _VIDEO_END]


class Glm46VFamily(Glm4vFamily):
    """See `Glm46V`."""

    of = Glm46V

    def config(self) -> dict[str, Any]:
        """The parts of GLM-4V."""
        made = tiny_glm("glm46v", {"head_dim": None})
        made["vision_config"]["model_type"], made["text_config"]["model_type"] = "glm4v_vision", "glm4v_text"
        return made


class Glm4vMoeFamily(Glm4vFamily):
    """See `Glm4vMoe`."""

    of = Glm4vMoe

    def config(self) -> dict[str, Any]:
        """Four experts, two of them at a time, after one dense layer."""
        experts = {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "partial_rotary_factor": 1.0,
        }
        return tiny_glm("glm4v_moe", experts)


class GlmOcrFamily(Glm4vFamily):
    """See `GlmOcr`."""

    of = GlmOcr

    def config(self) -> dict[str, Any]:
        """Four blocks."""
        return tiny_glm("glm_ocr", {})


def tiny_glm(kind: str, text: dict[str, Any]) -> dict[str, Any]:
    """A tiny configuration."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "image_size": 24}
    made = tiny_qwen(kind, vision, **text)
    del made["vision_start_token_id"], made["vision_end_token_id"], made["video_token_id"]
    return {
        **made,
        "image_start_token_id": _START,
        "image_end_token_id": _END,
        "video_start_token_id": _VIDEO_START,
        "video_end_token_id": _VIDEO_END,
    }
