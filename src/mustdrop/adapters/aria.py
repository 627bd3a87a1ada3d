"""Aria: cross-attention from learned queries resamples every image; a mixture of experts behind."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter
from mustdrop.adapters.idefics2 import RESAMPLED, resampled
from mustdrop.layout import Layout


class Aria(Adapter):
    """`AriaForConditionalGeneration`."""

    name = "aria"
    classes = ("AriaForConditionalGeneration",)
    lacks = {"vision": RESAMPLED}  # noqa: RUF012

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """As many queries per image or tile as its size asks for."""
        images, _, height, width = arguments["pixel_values"].shape
        patch = model.config.vision_config.patch_size
        queries = model.config.projector_patch_to_query_dict[(height // patch) * (width // patch)]
        return [resampled(queries)] * images
