"""Qwen3.5 and its mixture of experts: three of four decoder layers are linear attention (gated delta rule)."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.qwen2_vl import Qwen2VL
from mustdrop.adapters.states import STATES, recurrent_layers

#: With the usual epsilon the norm of nearly nothing, of a state that has hardly begun, makes noise of rounding large.


class Qwen35(Qwen2VL):
    """`Qwen3_5ForConditionalGeneration`."""

    name = "qwen3_5"
    classes = ("Qwen3_5ForConditionalGeneration",)
    since = "5.23"
    lacks = STATES

    def recurrent(self, model: Any) -> tuple[int, ...]:
        """The layers of linear attention."""
        return recurrent_layers(model.config.text_config)


class Qwen35Moe(Qwen35):
    """`Qwen3_5MoeForConditionalGeneration`."""

    name = "qwen3_5_moe"
    classes = ("Qwen3_5MoeForConditionalGeneration",)
