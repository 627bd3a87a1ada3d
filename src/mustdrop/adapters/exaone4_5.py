"""EXAONE 4.5: the windowed tower of Qwen2.5-VL with grouped keys, and plain positions in the text model."""

from __future__ import annotations

from mustdrop.adapters.qwen2_vl import Qwen25VL


class Exaone45(Qwen25VL):
    """`Exaone4_5_ForConditionalGeneration`."""

    name = "exaone4_5"
    classes = ("Exaone4_5_ForConditionalGeneration",)
    refuses_flash = "its sliding window would count what is left instead of positions"
    token_types: str | None = None
