"""LightOnOCR: the Pixtral tower of Mistral 3 under other names, and Qwen3."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.lighton_ocr import LightOnOcr
from tests.families.base import text
from tests.families.mistral3 import Mistral3Family


class LightOnOcrFamily(Mistral3Family):
    """See `LightOnOcr`."""

    of = LightOnOcr

    def config(self) -> dict[str, Any]:
        """As Mistral 3."""
        return {**super().config(), "model_type": "lighton_ocr", "text_config": text("qwen3")}
