"""Idefics2: a perceiver resamples every image to a fixed number of latents, which lie nowhere in the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters.idefics2 import Idefics2
from tests.families.base import IMAGE, text, tower
from tests.families.idefics3 import Idefics3Family


class Idefics2Family(Idefics3Family):
    """See `Idefics2`."""

    of = Idefics2

    def config(self) -> dict[str, Any]:
        """16 latents per image."""
        vision = tower("idefics2_vision")
        del vision["model_type"]
        perceiver = {"resampler_n_latents": 16, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 16}
        return {
            "model_type": "idefics2",
            "vision_config": vision,
            "perceiver_config": {**perceiver, "num_key_value_heads": 2, "hidden_size": 64, "initializer_range": 0.15},
            "text_config": text("mistral", sliding_window=None, initializer_range=0.25),
            "image_token_id": IMAGE,
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """16 tokens per image."""
        return {"pixel_values": torch.stack(images)}, [[IMAGE] * 16 for _ in images]

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One size."""
        return ((3, 24, 24),)
