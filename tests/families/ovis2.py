"""Ovis 2: an encoder with a head that makes each feature a mixture of rows of a table of visual words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters.ovis2 import Ovis2
from tests.families.base import IMAGE, Family, text, tower

_INDICATORS = [502, 503, 504, 505, 506]


class Ovis2Family(Family):
    """See `Ovis2`."""

    of = Ovis2

    def config(self) -> dict[str, Any]:
        """64 visual words, a stride of 2."""
        vision = tower("ovis2", image_size=48, vocab_size=64, hidden_stride=2, num_visual_indicator_tokens=5)
        del vision["model_type"]
        return {
            "model_type": "ovis2",
            "vision_config": {**vision, "tokenize_function": "softmax"},
            "text_config": text("qwen2"),
            "image_token_id": IMAGE,
            "visual_indicator_token_ids": _INDICATORS,
            "hidden_size": 64,
            "vocab_size": 512,
            "tie_word_embeddings": False,
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per tile, between indicators that stand for visual words as well."""
        runs = [[_INDICATORS[0], *[IMAGE] * 36, _INDICATORS[1]] for _ in images]
        return {"pixel_values": torch.stack(images)}, runs

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One tile."""
        return ((3, 48, 48),)
