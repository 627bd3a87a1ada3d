"""Janus and DeepSeek-VL, understanding images: an aligner between a SigLIP-like tower and Llama, no pooling.

Janus also draws; that path makes no vision tokens to drop and runs as before.
"""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.cost import linear_flops


class DeepseekVL(Adapter):
    """`DeepseekVLForConditionalGeneration`."""

    name = "deepseek_vl"
    classes = ("DeepseekVLForConditionalGeneration",)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """`model.model.vision_model`, without CLS."""
        return self.dense_tower(model.model.vision_model)

    def projector_flops(self, model: Any) -> int:
        """The aligner."""
        return linear_flops(model.model.aligner)


class Janus(DeepseekVL):
    """`JanusForConditionalGeneration`."""

    name = "janus"
    classes = ("JanusForConditionalGeneration",)
