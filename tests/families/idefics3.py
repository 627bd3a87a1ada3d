"""Idefics3 and SmolVLM: images and their tiles per row of the batch, pixel shuffle before the text model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters.idefics3 import Idefics3, SmolVLM
from tests.families.base import IMAGE, Family, text


class Idefics3Family(Family):
    """See `Idefics3`."""

    of = Idefics3

    def config(self) -> dict[str, Any]:
        """Three encoder layers and Llama."""
        return tiny_idefics("idefics3")

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per image."""
        return {"pixel_values": torch.stack(images)}, [[IMAGE] * 36 for _ in images]

    def rows(self, arguments: dict[str, Any], counts: list[int]) -> dict[str, Any]:
        """(rows, images, 3, height, width), missing images are zeros."""
        pixels = arguments["pixel_values"]
        padded = pixels.new_zeros(len(counts), max(counts), *pixels.shape[1:])
        for row, own in zip(padded, pixels.split(counts), strict=True):
            row[: len(own)] = own
        return {"pixel_values": padded}

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One size."""
        return ((3, 48, 48),)


class SmolVLMFamily(Idefics3Family):
    """See `SmolVLM`."""

    of = SmolVLM

    def config(self) -> dict[str, Any]:
        """Three encoder layers and Llama."""
        return tiny_idefics("smolvlm")


def tiny_idefics(kind: str) -> dict[str, Any]:
    """A tiny configuration."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 4,
        "initializer_range": 0.15,
    }
    return {
        "model_type": kind,
        "vision_config": vision,
        "text_config": text("llama"),
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": 0,
    }
