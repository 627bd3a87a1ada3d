"""Qwen3-VL and its mixture of experts: DeepStack adds features of earlier blocks to the first decoder layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from mustdrop.adapters.qwen2_vl import Qwen2VL
from mustdrop.cost import linear_flops


class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration`."""

    name = "qwen3_vl"
    classes = ("Qwen3VLForConditionalGeneration",)
    additions = ("_deepstack_process",)
    added_features = ("deepstack_features",)

    def projector_flops(self, model: Any) -> int:
        """The merger, and one more for each level of DeepStack."""
        return linear_flops(nn.ModuleList(self.tower(model).mergers))


class Qwen3VLMoe(Qwen3VL):
    """`Qwen3VLMoeForConditionalGeneration`."""

    name = "qwen3_vl_moe"
    classes = ("Qwen3VLMoeForConditionalGeneration",)
