"""LLaVA-NeXT: the whole image once, and again in tiles that are laid side by side, with a break after each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, stack
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
)

from mustdrop.adapters.llava_next import LlavaNext
from tests.families.base import IMAGE, Family, clip, text

PINPOINTS = [[24, 48], [48, 24], [48, 48]]


class LlavaNextFamily(Family):
    """See `LlavaNext`."""

    of = LlavaNext

    def config(self) -> dict[str, Any]:
        """CLIP and Mistral."""
        return {
            "model_type": "llava_next",
            "vision_config": clip(),
            "text_config": text("mistral", sliding_window=None),
            "image_token_id": IMAGE,
            "image_grid_pinpoints": PINPOINTS,
            "vision_feature_layer": -2,
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Padded to the same number of tiles, as the processor does."""
        arguments = tiny_tiles(self, model, images)
        return arguments, [[IMAGE] * layout.size for layout in self.adapter.layouts(model, modality, arguments)]

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Square, wide and tall images, whose tiles are partly padding."""
        return ((3, 48, 40), (3, 24, 48), (3, 40, 16))


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
