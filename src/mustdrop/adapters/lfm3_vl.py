"""LFM3-VL: packed patches in squares, and convolutions between the layers of attention, in the encoder too."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Tower
from mustdrop.adapters.qwen2_vl import Qwen2VL
from mustdrop.adapters.states import STATES, recurrent_layers
from mustdrop.cost import linear_flops


class Lfm3VL(Qwen2VL):
    """`Lfm3VlForConditionalGeneration`."""

    name = "lfm3_vl"
    classes = ("Lfm3VlForConditionalGeneration",)
    since = "5.23"
    token_types = None
    lacks = STATES

    def recurrent(self, model: Any) -> tuple[int, ...]:
        """The short convolutions."""
        return recurrent_layers(model.config.text_config)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """The encoder's layers of attention; its convolutions, which no token could be scored by, only cost."""
        visual = model.model.vision_tower
        attending = [kind == "full_attention" for kind in visual.config.layer_types]
        pairs = list(zip(visual.layers, attending, strict=True))
        return Tower(
            visual,
            type(visual.layers)([layer for layer, attends in pairs if attends]),
            packed=True,
            uncut="convolutions between its layers see neighbouring patches.",
            before=tuple(layer for layer, attends in pairs if not attends),
        )

    def projector_flops(self, model: Any) -> int:
        """The projector."""
        return linear_flops(model.model.multi_modal_projector)
