"""Aria: cross-attention from learned queries resamples every image; a mixture of experts behind."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.aria import Aria
from tests.families.base import IMAGE, Family, text, tower


class AriaFamily(Family):
    """See `Aria`."""

    of = Aria

    def config(self) -> dict[str, Any]:
        """16 queries for 36 patches; four experts, two at a time."""
        vision = tower("idefics3_vision")
        experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
        return {
            "model_type": "aria",
            "vision_config": vision,
            "text_config": text("aria_text", **experts),
            "image_token_id": IMAGE,
            "projector_patch_to_query_dict": {36: 16},
            "tie_word_embeddings": False,
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """16 tokens per image."""
        return {"pixel_values": stack(images)}, [[IMAGE] * 16 for _ in images]
