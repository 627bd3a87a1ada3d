"""LLaVA-NeXT: the whole image once, and again in tiles that are laid side by side, with a break after each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from mustdrop.adapters.base import Adapter
from mustdrop.layout import Layout


class LlavaNext(Adapter):
    """`LlavaNextForConditionalGeneration`."""

    name = "llava_next"
    classes = ("LlavaNextForConditionalGeneration",)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A square grid for the whole image, then the grid of the tiles without their padding."""
        side = _side(model)
        found, first = [], 0
        for size, tiles in zip(arguments["image_sizes"], self._tiles(model, arguments), strict=True):
            whole = Layout.of_frames((1, side, side), (side, side), first)
            found.append(
                whole.with_breaks() if tiles == 1 else Layout.join([whole, self._tiled(model, size, first + 1)])
            )
            first += tiles
        return found

    def _tiles(self, model: Any, arguments: dict[str, Any]) -> list[int]:
        """Encoder items per image."""
        config = model.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            for size in arguments["image_sizes"]
        ]

    def _tiled(self, model: Any, size: Tensor, first: int) -> Layout:
        """The tiles of one image as one grid, by the model's own cutting."""
        patch = tile_patches(model, size, first)
        rows, columns = patch.shape
        grid = Layout(
            ((1, rows, columns),), torch.arange(rows * columns, dtype=torch.long, device="cpu"), patch.reshape(-1, 1)
        )
        return grid.with_breaks(each_row=True)


def _side(model: Any) -> int:
    vision = model.config.vision_config
    return int(vision.image_size // vision.patch_size)


def tile_patches(model: Any, size: Tensor, first: int) -> Tensor:
    """(rows, columns) long, the encoder's patch at each place of the tiles, without the padding of the image.

    Args:
        model: of this family.
        size: (height, width) of the image.
        first: place of the first tile in the encoder's batch.
    """
    side, config = _side(model), model.config
    high, wide = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    patch = (
        torch.arange(high * wide * side * side, dtype=torch.long, device="cpu").view(high, wide, side, side)
        + first * side * side
    )
    whole = patch.permute(0, 2, 1, 3).reshape(1, high * side, wide * side)
    return unpad_image(whole, size)[0]  # type: ignore[no-any-return]
