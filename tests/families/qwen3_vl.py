"""Qwen3-VL and its mixture of experts: DeepStack adds features of earlier blocks to the first decoder layers."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.qwen3_vl import Qwen3VL, Qwen3VLMoe
from tests.families.qwen2_vl import Qwen2VLFamily, tiny_qwen

_START, _END = 502, 503
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 1],
}


class Qwen3VLFamily(Qwen2VLFamily):
    """See `Qwen3VL`."""

    of = Qwen3VL

    def config(self) -> dict[str, Any]:
        """DeepStack from the first two blocks."""
        return tiny_qwen("qwen3_vl", _VISION)

    def run(self, token: int, frames: int, per_frame: int) -> list[int]:
        """A video has a timestamp (text) before each frame."""
        run = []
        for t in range(frames):
            run += [*([10 + t] if frames > 1 else []), _START, *[token] * per_frame, _END]
        return run


class Qwen3VLMoeFamily(Qwen3VLFamily):
    """See `Qwen3VLMoe`."""

    of = Qwen3VLMoe

    def config(self) -> dict[str, Any]:
        """Four experts, two of them at a time."""
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
        return tiny_qwen("qwen3_vl_moe", _VISION, mlp_only_layers=[], **experts)
