"""HyperCLOVA X SEED Vision v2: the tower of Qwen2.5-VL, one more projection, and plain positions in the text model."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.hyperclovax_vision_v2 import HyperClovaXVision
from tests.families.base import text
from tests.families.qwen2_vl import Qwen25VLFamily


class HyperClovaXVisionFamily(Qwen25VLFamily):
    """See `HyperClovaXVision`."""

    of = HyperClovaXVision

    def config(self) -> dict[str, Any]:
        """As Qwen2.5-VL, 48 wide before the projection."""
        made = super().config()
        del made["vision_start_token_id"], made["vision_end_token_id"]
        vision = {**made["vision_config"], "out_hidden_size": 48, "model_type": "qwen2_5_vl_vision"}
        return {**made, "model_type": self.adapter.name, "vision_config": vision, "text_config": text("hyperclovax")}
