"""Qianfan-OCR: InternVL with other encoder layers, and Qwen3."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.qianfan_ocr import QianfanOCR
from tests.families.base import text
from tests.families.internvl import InternVLFamily


class QianfanOCRFamily(InternVLFamily):
    """See `QianfanOCR`."""

    of = QianfanOCR

    def config(self) -> dict[str, Any]:
        """As InternVL."""
        return {**super().config(), "model_type": "qianfan_ocr", "text_config": text("qwen3")}
