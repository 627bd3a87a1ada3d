"""Cosmos 3 Omni, the reasoner: a Qwen3-VL under another name."""

from __future__ import annotations

from mustdrop.adapters.qwen3_vl import Qwen3VL


class Cosmos3Omni(Qwen3VL):
    """`Cosmos3OmniForConditionalGeneration`."""

    name = "cosmos3_omni"
    classes = ("Cosmos3OmniForConditionalGeneration",)
