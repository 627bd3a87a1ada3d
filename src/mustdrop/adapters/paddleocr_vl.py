"""PaddleOCR-VL: patches in raster order, packed; the projector takes squares of them."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout


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
        return Tower(visual, visual.encoder.layers, packed=True, embeds=visual.embeddings.patch_embedding)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per image, its patches row by row."""
        merge = model.config.vision_config.spatial_merge_size
        return packed_frames(arguments["image_grid_thw"].tolist(), merge)

    def projector_flops(self, model: Any) -> int:
        """The projector."""
        return linear_flops(model.model.projector)


def packed_frames(grids: list[list[int]], merge: int) -> list[Layout]:
    """Layouts of media whose (frames, rows, columns) of patches follow one another in raster order."""
    found, start = [], 0
    for frames, rows, columns in grids:
        one = Layout.of_frames((frames, rows // merge, columns // merge), (rows, columns), pool=merge)
        found.append(Layout(one.grids, one.cells, one.patches + start))
        start += frames * rows * columns
    return found
