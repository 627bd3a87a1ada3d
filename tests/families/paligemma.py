"""PaliGemma and PaliGemma 2: the whole prompt, image and question, sees both ways; only the answer is causal."""

from __future__ import annotations

from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.paligemma import PaliGemma
from tests.families.base import IMAGE, Family, siglip, text


class PaliGemmaFamily(Family):
    """See `PaliGemma`."""

    of = PaliGemma

    def config(self) -> dict[str, Any]:
        """SigLIP and Gemma (PaliGemma 2 has Gemma 2, which transformers runs with eager or flash attention only)."""
        return {
            "model_type": "paligemma",
            "vision_config": siglip(projection_dim=64),
            "text_config": text("gemma"),
            "image_token_id": IMAGE,
            "projection_dim": 64,
            "tie_word_embeddings": False,
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per image."""
        return {"pixel_values": stack(images)}, [[IMAGE] * 36 for _ in images]

    def types(self, kinds: Tensor) -> dict[str, Tensor]:
        """0 is the prefix, 1 the answer."""
        return {"token_type_ids": kinds * 0}
