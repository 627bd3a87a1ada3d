"""Molmo 2: overlapping crops, pooled by attention over patches that the processor names; image tokens see each other.

Features are added to the embeddings of the placeholders. Images and the frames of videos share one placeholder token.
"""

from __future__ import annotations

from typing import Any

import torch

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.layout import Layout


class Molmo2(Adapter):
    """`Molmo2ForConditionalGeneration`."""

    fixed_pictures = "its encoder takes patches, which the processor cut in an order and with positions of its own."
    name = "molmo2"
    classes = ("Molmo2ForConditionalGeneration",)
    refuses_flash = "image tokens see each other both ways, which flash attention cannot express"
    token_types = "mm_token_type_ids"
    media = {  # noqa: RUF012
        **Adapter.media,
        "video": ("get_video_features", ("pixel_values_videos",), "image_token_id"),
    }

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """A SigLIP over crops or frames."""
        visual = model.model.vision_tower
        return Tower(visual, visual.layers)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """Per image the grid of the whole and that of its crops; per video one of frames. The patches are given."""
        pooling = arguments[f"{modality}_token_pooling"].cpu()
        pooling = pooling[(pooling >= 0).any(-1)]
        found, start = [], 0
        for grid in arguments[f"{modality}_grids"].tolist():
            grids = ((1, *grid[:2]), (1, *grid[2:])) if modality == "image" else (tuple(grid),)
            size = sum(frames * rows * columns for frames, rows, columns in grids)
            found.append(
                Layout(grids, torch.arange(size, dtype=torch.long, device="cpu"), pooling[start : start + size])
            )
            start += size
        return found

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int | None:
        """None: crops overlap, so tokens merge after the encoder."""
        return None

    def read_layers(self, model: Any, modality: str, arguments: dict[str, Any]) -> tuple[int, ...]:
        """The layers that the adapter reads."""
        depth = len(self.tower(model, modality).blocks)
        return tuple(int(k) % depth for k in model.config.adapter_config.vision_feature_layer)

    def read_layer(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """The last: tokens merge after the encoder, where all layers have run."""
        return max(self.read_layers(model, modality, arguments))
