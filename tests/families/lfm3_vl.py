"""LFM3-VL: packed patches in squares, and convolutions between the layers of attention, in the encoder too."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.lfm3_vl import Lfm3VL
from tests.families.base import text, tokens
from tests.families.qwen2_vl import Qwen2VLFamily

_START, _END = 502, 503


class Lfm3VLFamily(Qwen2VLFamily):
    """See `Lfm3VL`."""

    of = Lfm3VL

    def config(self) -> dict[str, Any]:
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

    def run(self, token: int, frames: int, per_frame: int) -> list[int]:
        """A video has a timestamp (text) before each frame."""
        run = []
        for t in range(frames):
            run += [*([10 + t] if frames > 1 else []), _START, *[token] * per_frame, _END]
        return run
