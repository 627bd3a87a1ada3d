"""Cosmos 3 Omni, the reasoner: a Qwen3-VL under another name."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.cosmos3_omni import Cosmos3Omni
from tests.families.qwen3_vl import Qwen3VLFamily

_PARTS = ("text_config", "vision_config")


class Cosmos3OmniFamily(Qwen3VLFamily):
    """See `Cosmos3Omni`."""

    of = Cosmos3Omni

    def config(self) -> dict[str, Any]:
        """The tiny Qwen3-VL."""
        made = super().config()
        parts = {name: made[name] | {"model_type": f"qwen3_vl_{name.split('_')[0]}"} for name in _PARTS}
        return made | parts | {"model_type": "cosmos3_omni"}
