"""LLaVA-NeXT: the whole image once, and again in tiles that are laid side by side, with a break after each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, stack
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from mustdrop.adapters.base import Adapter
from mustdrop.adapters.tiny import IMAGE, clip, text
from mustdrop.layout import Layout

PINPOINTS = [[24, 48], [48, 24], [48, 48]]


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

    def tiny(self) -> dict[str, Any]:
        """CLIP and Mistral."""
        return {
            "model_type": "llava_next",
            "vision_config": clip(),
            "text_config": text("mistral", sliding_window=None),
            "image_token_id": IMAGE,
            "image_grid_pinpoints": PINPOINTS,
            "vision_feature_layer": -2,
        }

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Padded to the same number of tiles, as the processor does."""
        arguments = tiny_tiles(self, model, images)
        return arguments, [[IMAGE] * layout.size for layout in self.layouts(model, modality, arguments)]

    def tiny_sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Square, wide and tall images, whose tiles are partly padding."""
        return ((3, 48, 40), (3, 24, 48), (3, 40, 16))


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


def tiny_tiles(adapter: LlavaNext, model: Any, images: list[Tensor]) -> dict[str, Any]:
    """The whole image and its tiles at 24 x 24 pixels, and the sizes; fewer tiles are padded with zeros."""
    resize = torch.nn.functional.interpolate
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.long, device="cpu")
    made = []
    for image, size in zip(images, sizes, strict=True):
        high, wide = get_anyres_image_grid_shape(size, PINPOINTS, 24)
        scale = min(high * 24 / int(size[0]), wide * 24 / int(size[1]))
        fitted = resize(image[None], size=[max(1, round(int(side) * scale)) for side in size])[0]
        canvas = torch.zeros(3, high * 24, wide * 24, dtype=torch.float32, device="cpu")
        top, left = (canvas.shape[1] - fitted.shape[1]) // 2, (canvas.shape[2] - fitted.shape[2]) // 2
        canvas[:, top : top + fitted.shape[1], left : left + fitted.shape[2]] = fitted
        tiles = canvas.view(3, high, 24, wide, 24).permute(1, 3, 0, 2, 4).flatten(0, 1)
        made.append(torch.cat([resize(image[None], size=(24, 24)), tiles]))
    most = max(map(len, made))
    padded = [torch.nn.functional.pad(tiles, (0, 0, 0, 0, 0, 0, 0, most - len(tiles))) for tiles in made]
    return {"pixel_values": stack(padded), "image_sizes": sizes}
