"""ViP-LLaVA: LLaVA whose features are several encoder layers side by side, without their CLS rows."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.vipllava import _NAMES, VipLlava
from tests.families.base import IMAGE, clip, text
from tests.families.llava import LlavaFamily


class VipLlavaFamily(LlavaFamily):
    """See `VipLlava`."""

    of = VipLlava

    def config(self) -> dict[str, Any]:
        """The last two layers of CLIP, and Llama."""
        return {
            "model_type": "vipllava",
            "vision_config": clip(),
            "text_config": text("llama"),
            "image_token_id": IMAGE,
            **{name: [-1, -2] for name in _NAMES},
        }
