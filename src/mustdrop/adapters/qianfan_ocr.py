"""Qianfan-OCR: InternVL with other encoder layers, and Qwen3."""

from __future__ import annotations

from mustdrop.adapters.internvl import InternVL


class QianfanOCR(InternVL):
    """`QianfanOCRForConditionalGeneration`."""

    name = "qianfan_ocr"
    classes = ("QianfanOCRForConditionalGeneration",)
