"""PaddleOCR-VL: patches in raster order, packed; the projector takes squares of them."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.adapters.paddleocr_vl import PaddleOCRVL
from tests.families.base import IMAGE, Family, tower
from tests.families.qwen2_vl import tiny_qwen

_START, _END = 502, 503


class PaddleOCRVLFamily(Family):
    """See `PaddleOCRVL`."""

    of = PaddleOCRVL

    def config(self) -> dict[str, Any]:
        """Four blocks and Ernie 4.5."""
        made = tiny_qwen("paddleocr_vl", {}, initializer_range=0.2)
        return {**made, "vision_config": tower("paddleocr_vl_vision")}

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Packed patches (3, 4, 4) and their grids."""
        pixels = torch.cat([rearrange(image, "c (h p) (w q) -> (h w) c p q", p=4, q=4) for image in images])
        grids = [[1, image.shape[1] // 4, image.shape[2] // 4] for image in images]
        runs = [[_START, *[IMAGE] * (rows * columns // 4), _END] for _, rows, columns in grids]
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids, dtype=torch.long, device="cpu")}, runs

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Three sizes."""
        return ((3, 32, 32), (3, 24, 40), (3, 40, 24))
