"""Qianfan-OCR: InternVL with other encoder layers, and Qwen3."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.internvl import InternVL
from mustdrop.adapters.tiny import text


class QianfanOCR(InternVL):
    """`QianfanOCRForConditionalGeneration`."""

    name = "qianfan_ocr"
    classes = ("QianfanOCRForConditionalGeneration",)

    def tiny(self) -> dict[str, Any]:
        """As InternVL."""
        return {**super().tiny(), "model_type": "qianfan_ocr", "text_config": text("qwen3")}
