"""Gemma 3: average pooling behind SigLIP, image blocks that see both ways, sliding-window layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.gemma3 import Gemma3
from tests.families.base import IMAGE, Family, siglip, text

_BEGIN, _END = 504, 505


class Gemma3Family(Family):
    """See `Gemma3`."""

    of = Gemma3

    def config(self) -> dict[str, Any]:
        """Three of five decoder layers see 16 tokens back."""
        kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        return {
            "model_type": "gemma3",
            "vision_config": siglip(image_size=48),
            "text_config": text("gemma3_text", sliding_window=16, query_pre_attn_scalar=16, layer_types=kinds),
            "image_token_id": IMAGE,
            "boi_token_index": _BEGIN,
            "eoi_token_index": _END,
            "mm_tokens_per_image": 36,
            "tie_word_embeddings": False,
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per image between its markers."""
        return {"pixel_values": stack(images)}, [[_BEGIN, *[IMAGE] * 36, _END] for _ in images]

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One size."""
        return ((3, 48, 48),)
