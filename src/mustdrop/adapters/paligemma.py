"""PaliGemma and PaliGemma 2: the whole prompt, image and question, sees both ways; only the answer is causal."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter
from mustdrop.layout import Layout


class PaliGemma(Adapter):
    """`PaliGemmaForConditionalGeneration`."""

    name = "paligemma"
    classes = ("PaliGemmaForConditionalGeneration",)
    token_types = "token_type_ids"

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A square grid per image."""
        encoder_grid = self.encoder_grid(model, modality, arguments)
        images = range(len(arguments["pixel_values"]))
        return [Layout.of_frames((1, *encoder_grid), encoder_grid, i) for i in images]
