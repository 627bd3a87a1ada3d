"""LFM2-VL: SigLIP 2 on patches of pictures of any shape, and short convolutions between the layers of attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
