"""Idefics3 and SmolVLM: images and their tiles per row of the batch, pixel shuffle before the text model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.adapters.tiny import IMAGE, text
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout


class Idefics3(Adapter):
    """`Idefics3ForConditionalGeneration`."""

    name = "idefics3"
    classes = ("Idefics3ForConditionalGeneration",)

    def text(self, model: Any) -> nn.Module:
        """`model.model.text_model`."""
        return model.model.text_model  # type: ignore[no-any-return]

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """`model.model.vision_model`."""
        return self.dense_tower(model.model.vision_model)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """One medium per row of the batch: its images and tiles, one grid each; images of zeros are padding."""
        encoder_grid = self.encoder_grid(model, modality, arguments)
        pool = self.pool(model, modality, arguments)
        grid = (1, encoder_grid[0] // pool, encoder_grid[1] // pool)
        found, first = [], 0
        for count in (arguments["pixel_values"] != 0).flatten(2).any(-1).sum(1).tolist():
            parts = [Layout.of_frames(grid, encoder_grid, first + i, pool=pool) for i in range(count)]
            found.append(Layout.join(parts))
            first += count
        return found

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """Side of the pixel shuffle."""
        return int(model.config.scale_factor)

    def projector_flops(self, model: Any) -> int:
        """The connector."""
        return linear_flops(model.model.connector)

    def tiny(self) -> dict[str, Any]:
        """Three encoder layers and Llama."""
        return tiny_idefics("idefics3")

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per image."""
        return {"pixel_values": torch.stack(images)}, [[IMAGE] * 36 for _ in images]

    def tiny_rows(self, arguments: dict[str, Any], counts: list[int]) -> dict[str, Any]:
        """(rows, images, 3, height, width), missing images are zeros."""
        pixels = arguments["pixel_values"]
        padded = pixels.new_zeros(len(counts), max(counts), *pixels.shape[1:])
        for row, own in zip(padded, pixels.split(counts), strict=True):
            row[: len(own)] = own
        return {"pixel_values": padded}

    def tiny_sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One size."""
        return ((3, 48, 48),)


class SmolVLM(Idefics3):
    """`SmolVLMForConditionalGeneration`."""

    name = "smolvlm"
    classes = ("SmolVLMForConditionalGeneration",)

    def tiny(self) -> dict[str, Any]:
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
