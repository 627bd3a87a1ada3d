"""LFM2-VL: SigLIP 2 on patches of pictures of any shape, and short convolutions between the layers of attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.adapters.states import STATES, recurrent_layers
from mustdrop.layout import Layout


class Lfm2VL(Adapter):
    """`Lfm2VlForConditionalGeneration`; each tile of a picture is a medium of its own."""

    name = "lfm2_vl"
    classes = ("Lfm2VlForConditionalGeneration",)
    since = "5.23"
    lacks = STATES
    cell_pixels = True
    fixed_pictures = "its encoder takes patches, which the processor has cut."

    def recurrent(self, model: Any) -> tuple[int, ...]:
        """The short convolutions."""
        return recurrent_layers(model.config.text_config)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """A SigLIP 2; what it knows of the grid is in the patches when its layers run."""
        return replace(super().tower(model, modality), padded=True)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per picture; its patches, row by row, are padded to those of the largest one."""
        item, side = arguments["pixel_values"].shape[1], int(model.config.downsample_factor)
        found = []
        for i, (rows, columns) in enumerate(arguments["spatial_shapes"].tolist()):
            one = Layout.of_frames((1, rows // side, columns // side), (rows, columns), pool=side)
            found.append(Layout(one.grids, one.cells, one.patches + i * item))
        return found

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> None:
        """None: patches leave in cells, of rows of any length."""
        return

    def pixels(self, model: Any, modality: str, arguments: dict[str, Any]) -> Tensor:
        """The patches of all pictures, with their padding."""
        return arguments["pixel_values"].flatten(0, 1)  # type: ignore[no-any-return]

    def tiny(self) -> dict[str, Any]:
        """Three convolutions and two layers of attention."""
        kinds = ["conv", "full_attention", "conv", "conv", "full_attention"]
        decoder = text("lfm2", layer_types=kinds, conv_L_cache=3, block_auto_adjust_ff_dim=False)
        del decoder["head_dim"]
        vision = tower("siglip2_vision_model", num_patches=36, vision_use_head=False)
        del vision["image_size"]
        return {
            "model_type": "lfm2_vl",
            "vision_config": vision,
            "text_config": decoder,
            "projector_hidden_size": 48,
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        }

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Patches of (4, 4, 3), padded, their grids and what is no padding."""
        made = [rearrange(image, "c (h p) (w q) -> (h w) (p q c)", p=4, q=4) for image in images]
        shapes = [(image.shape[-2] // 4, image.shape[-1] // 4) for image in images]
        most = max(len(patches) for patches in made)
        mask = torch.tensor([[1] * len(p) + [0] * (most - len(p)) for p in made], dtype=torch.long, device="cpu")
        arguments = {
            "pixel_values": torch.stack([torch.nn.functional.pad(p, (0, 0, 0, most - len(p))) for p in made]),
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor(shapes, dtype=torch.long, device="cpu"),
        }
        return arguments, [[_START, *[IMAGE] * (rows * columns // 4), _END] for rows, columns in shapes]

    def tiny_sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Three shapes."""
        return ((3, 32, 32), (3, 24, 40), (3, 40, 24))
