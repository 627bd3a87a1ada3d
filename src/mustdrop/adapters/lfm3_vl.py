"""LFM3-VL: packed patches in squares, and convolutions between the layers of attention, in the encoder too."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Tower
from mustdrop.adapters.qwen2_vl import Qwen2VL
from mustdrop.adapters.states import STATES, recurrent_layers
from mustdrop.adapters.tiny import text, tokens
from mustdrop.cost import linear_flops

_START, _END = 502, 503


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

    def tiny(self) -> dict[str, Any]:
        """Two of four encoder layers attend, and two of five decoder layers."""
        kinds = ["conv", "full_attention", "conv", "conv", "full_attention"]
        decoder = text("lfm3", layer_types=kinds)
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "patch_size": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "initializer_range": 0.15,
        }
        return {
            "model_type": "lfm3_vl",
            "vision_config": vision,
            "text_config": decoder,
            "projector_hidden_size": 48,
            "tie_word_embeddings": False,
            **tokens(vision_start_token_id=_START, vision_end_token_id=_END),
        }

    def tiny_run(self, token: int, frames: int, per_frame: int) -> list[int]:
        """A video has a timestamp (text) before each frame."""
        run = []
        for t in range(frames):
            run += [*([10 + t] if frames > 1 else []), _START, *[token] * per_frame, _END]
        return run
