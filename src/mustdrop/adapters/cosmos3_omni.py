"""Cosmos 3 Omni, the reasoner: a Qwen3-VL under another name."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.qwen3_vl import Qwen3VL


class Cosmos3Omni(Qwen3VL):
    """`Cosmos3OmniForConditionalGeneration`."""

    name = "cosmos3_omni"
    classes = ("Cosmos3OmniForConditionalGeneration",)

    def tiny(self) -> dict[str, Any]:
        """The tiny Qwen3-VL."""
        made = super().tiny()
        parts = {name: made[name] | {"model_type": f"qwen3_vl_{name.split('_')[0]}"} for name in _PARTS}
        return made | parts | {"model_type": "cosmos3_omni"}


_PARTS = ("text_config", "vision_config")
