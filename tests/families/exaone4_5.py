"""EXAONE 4.5: the windowed tower of Qwen2.5-VL with grouped keys, and plain positions in the text model."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.exaone4_5 import Exaone45
from tests.families.base import text
from tests.families.qwen2_vl import Qwen25VLFamily


class Exaone45Family(Qwen25VLFamily):
    """See `Exaone45`."""

    of = Exaone45

    def config(self) -> dict[str, Any]:
        """Three of five decoder layers see 16 tokens back; the others have no positions."""
        made = super().config()
        kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        del made["vision_config"]["tokens_per_second"], made["vision_start_token_id"], made["vision_end_token_id"]
        made["vision_config"]["num_key_value_heads"] = 2
        made["text_config"] = text("exaone4", sliding_window=16, layer_types=kinds)
        return {**made, "model_type": "exaone4_5"}
