"""Molmo 2: overlapping crops, pooled by attention over named patches; image tokens see each other."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.adapters.molmo2 import Molmo2
from tests.families.base import IMAGE, Family, text

_START, _LOW, _END, _FRAME_START, _FRAME_END, _COLUMN = 502, 503, 504, 505, 506, 507


class Molmo2Family(Family):
    """See `Molmo2`."""

    of = Molmo2

    def config(self) -> dict[str, Any]:
        """6 x 6 patches per crop, 2 x 2 to a feature, two of four encoder layers."""
        vision = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
        return {
            "model_type": "molmo2",
            "vision_config": {
                **vision,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "image_size": [24, 24],
                "patch_size": 4,
                "initializer_range": 0.15,
            },
            "adapter_config": {
                **vision,
                "vision_feature_layer": [3, 1],
                "intermediate_size": 64,
                "text_hidden_size": 64,
                "initializer_range": 0.15,
            },
            "text_config": text("molmo2_text", additional_vocab_size=0),
            "image_patch_id": IMAGE,
            "image_start_token_id": _START,
            "low_res_image_start_token_id": _LOW,
            "image_end_token_id": _END,
            "frame_start_token_id": _FRAME_START,
            "frame_end_token_id": _FRAME_END,
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """The whole image and two crops that overlap by half, side by side; or frames."""
        corner = torch.arange(36, dtype=torch.long, device="cpu").view(6, 6)
        square = rearrange(corner, "(h a) (w b) -> (h w) (a b)", a=2, b=2)
        # the crops are 6 x 6 patches each, the second begins at the third column of the first: 6 x 9 in all
        wide = torch.nn.functional.pad(torch.cat([corner, 36 + corner[:, 3:]], 1), (0, 1), value=-37)
        wide = rearrange(wide, "(h a) (w b) -> (h w) (a b)", a=2, b=2)
        crops: list[Tensor] = []
        pooling, grids, runs = [], [], []
        for image in images:
            start = 36 * len(crops)
            if modality == "image":
                wider = torch.nn.functional.interpolate(image[None], size=(24, 36))[0]
                crops += [image, wider[..., :24], wider[..., 12:]]
                pooling += [square + start, torch.where(wide < 0, -1, wide + start + 36)]
                grids.append([3, 3, 3, 5])
                run = [_LOW, *[IMAGE] * 9, _END, _START]
                for _ in range(3):
                    run += [*[IMAGE] * 5, _COLUMN]
                runs.append([*run, _END])
            else:
                crops += list(image)
                pooling += [square + start + 36 * t for t in range(len(image))]
                grids.append([len(image), 3, 3])
                runs.append([i for t in range(len(image)) for i in (10 + t, _FRAME_START, *[IMAGE] * 9, _FRAME_END)])
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        patches = rearrange(torch.stack(crops), "n c (h p) (w q) -> n (h w) (p q c)", p=4, q=4)
        arguments = {
            name: patches,
            f"{modality}_token_pooling": torch.cat(pooling),
            f"{modality}_grids": torch.tensor(grids, dtype=torch.long, device="cpu"),
        }
        if modality == "image":
            arguments["image_num_crops"] = torch.full((len(images),), 3, dtype=torch.long, device="cpu")
        return arguments, runs

    def types(self, kinds: Tensor) -> dict[str, Tensor]:
        """1 for images and frames."""
        return {"mm_token_type_ids": (kinds > 0).long()}

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One size; two or three frames."""
        return ((3, 24, 24),) if modality == "image" else ((3, 3, 24, 24), (2, 3, 24, 24))
