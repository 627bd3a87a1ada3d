"""Qwen3.5 and its mixture of experts: three of four decoder layers are linear attention (gated delta rule)."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.qwen3_5 import Qwen35, Qwen35Moe
from tests.families.qwen2_vl import Qwen2VLFamily, tiny_qwen

_START, _END = 502, 503
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_position_embeddings": 36,
}
_DECODER = {
    "rms_norm_eps": 0.01,
    "num_hidden_layers": 5,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


class Qwen35Family(Qwen2VLFamily):
    """See `Qwen35`."""

    of = Qwen35

    def config(self) -> dict[str, Any]:
        """Three layers of linear attention and two of full attention."""
        return tiny_qwen35("qwen3_5")

    def run(self, token: int, frames: int, per_frame: int) -> list[int]:
        """A video has a timestamp (text) before each frame."""
        run = []
        for t in range(frames):
            run += [*([10 + t] if frames > 1 else []), _START, *[token] * per_frame, _END]
        return run


class Qwen35MoeFamily(Qwen35Family):
    """See `Qwen35Moe`."""

    of = Qwen35Moe

    def config(self) -> dict[str, Any]:
        """Four experts, two of them at a time, and one that all tokens share."""
        experts = {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }
        return tiny_qwen35("qwen3_5_moe", **experts)


def tiny_qwen35(kind: str, **settings: Any) -> dict[str, Any]:
    """A tiny configuration; a quarter of a head rotates."""
    made = tiny_qwen(kind, _VISION, **_DECODER, **settings)
    made["text_config"]["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    }
    return made
