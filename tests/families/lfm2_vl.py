"""LFM2-VL: SigLIP 2 on patches of pictures of any shape, and short convolutions between the layers of attention."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.adapters.lfm2_vl import Lfm2VL
from tests.families.base import IMAGE, Family, text, tower

_START, _END = 502, 503


class Lfm2VLFamily(Family):
    """See `Lfm2VL`."""

    of = Lfm2VL

    def config(self) -> dict[str, Any]:
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

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
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

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Three shapes."""
        return ((3, 32, 32), (3, 24, 40), (3, 40, 24))
