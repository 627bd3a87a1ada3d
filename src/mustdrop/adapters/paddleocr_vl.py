"""PaddleOCR-VL: patches in raster order, packed; the projector takes squares of them."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.adapters.qwen2_vl import tiny_qwen
from mustdrop.adapters.tiny import IMAGE, tower
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout

_START, _END = 502, 503


class PaddleOCRVL(Adapter):
    """`PaddleOCRVLForConditionalGeneration`."""

    fixed_pictures = "its encoder takes patches, which the processor cut in an order and with positions of its own."
    name = "paddleocr_vl"
    classes = ("PaddleOCRVLForConditionalGeneration",)
    token_types: str | None = "mm_token_type_ids"
    cell_pixels = True

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """A SigLIP with rotary embeddings."""
        visual = model.model.visual.vision_model
        return Tower(visual, visual.encoder.layers, packed=True)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per image, its patches row by row."""
        merge = model.config.vision_config.spatial_merge_size
        return packed_frames(arguments["image_grid_thw"].tolist(), merge)

    def projector_flops(self, model: Any) -> int:
        """The projector."""
        return linear_flops(model.model.projector)

    def tiny(self) -> dict[str, Any]:
        """Four blocks and Ernie 4.5."""
        made = tiny_qwen("paddleocr_vl", {}, initializer_range=0.2)
        return {**made, "vision_config": tower("paddleocr_vl_vision")}

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Packed patches (3, 4, 4) and their grids."""
        pixels = torch.cat([rearrange(image, "c (h p) (w q) -> (h w) c p q", p=4, q=4) for image in images])
        grids = [[1, image.shape[1] // 4, image.shape[2] // 4] for image in images]
        runs = [[_START, *[IMAGE] * (rows * columns // 4), _END] for _, rows, columns in grids]
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids, dtype=torch.long, device="cpu")}, runs

    def tiny_sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Three sizes."""
        return ((3, 32, 32), (3, 24, 40), (3, 40, 24))


def packed_frames(grids: list[list[int]], merge: int) -> list[Layout]:
    """Layouts of media whose (frames, rows, columns) of patches follow one another in raster order."""
    found, start = [], 0
    for frames, rows, columns in grids:
        one = Layout.of_frames((frames, rows // merge, columns // merge), (rows, columns), pool=merge)
        found.append(Layout(one.grids, one.cells, one.patches + start))
        start += frames * rows * columns
    return found
