"""GLM-4.1V, 4.5V, 4.6V and GLM-OCR: packed patches as in Qwen-VL; images and videos share one placeholder token."""

from __future__ import annotations

from typing import Any

from torch import nn

from mustdrop.adapters.base import Adapter
from mustdrop.adapters.qwen2_vl import Qwen2VL
from mustdrop.cost import linear_flops


class Glm4v(Qwen2VL):
    """`Glm4vForConditionalGeneration`."""

    name = "glm4v"
    classes = ("Glm4vForConditionalGeneration",)
    media = {  # noqa: RUF012
        **Adapter.media,
        "video": ("get_video_features", ("pixel_values_videos",), "image_token_id"),
    }

    def projector_flops(self, model: Any) -> int:
        """A convolution that makes 2 x 2 patches one, and the merger."""
        visual = model.model.visual
        return 2 * int(visual.downsample.weight.numel()) + linear_flops(nn.ModuleList([visual.merger]))


class Glm46V(Glm4v):
    """`Glm46VForConditionalGeneration`."""

    name = "glm46v"
    classes = ("Glm46VForConditionalGeneration",)


class Glm4vMoe(Glm4v):
    """`Glm4vMoeForConditionalGeneration`."""

    name = "glm4v_moe"
    classes = ("Glm4vMoeForConditionalGeneration",)


class GlmOcr(Glm4v):
    """`GlmOcrForConditionalGeneration`."""

    name = "glm_ocr"
    classes = ("GlmOcrForConditionalGeneration",)
