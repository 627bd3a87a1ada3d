"""LLaVA-OneVision: tiles as LLaVA-NeXT (resampled where there are many), videos resampled to half the side."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters.base import Adapter
from mustdrop.adapters.llava_next import LlavaNext, tile_patches
from mustdrop.layout import Layout


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`."""

    name = "llava_onevision"
    classes = ("LlavaOnevisionForConditionalGeneration",)
    media = {  # noqa: RUF012
        **Adapter.media,
        "video": ("get_video_features", ("pixel_values_videos",), "video_token_id"),
    }

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """Images as in LLaVA-NeXT; videos as resampled frames with one break at the end."""
        if modality == "image":
            return super().layouts(model, modality, arguments)
        side = self.encoder_grid(model, modality, arguments)[0]
        videos, frames = arguments["pixel_values_videos"].shape[:2]
        return [self.resampled_frames(frames, side, i * frames) for i in range(videos)]

    @staticmethod
    def resampled_frames(frames: int, side: int, first: int) -> Layout:
        """One video: frames of half the side, and a break at the end.

        Args:
            frames: how many.
            side: patches per side of a frame.
            first: place of the first frame in the encoder's batch.
        """
        half = math.ceil(side / 2)
        rows = _taps(side, half)  # (half, 2)
        frame = (rows[:, None, :, None] * side + rows[None, :, None, :]).reshape(half * half, 4)
        item = (first + torch.arange(frames, dtype=torch.long, device="cpu")) * side * side
        patches = (item[:, None, None] + frame).flatten(0, 1)
        cells = torch.arange(frames * half * half, dtype=torch.long, device="cpu")
        return Layout(((frames, half, half),), cells, patches).with_breaks()

    def _tiles(self, model: Any, arguments: dict[str, Any]) -> list[int]:
        """Encoder items per image: a prompt with several images has no tiles."""
        tiles = super()._tiles(model, arguments)
        images = arguments.get("batch_num_images")
        if images is None:
            return tiles
        alone = [int(n) == 1 for n in images for _ in range(int(n))]
        return [n if single else 1 for n, single in zip(tiles, alone, strict=True)]

    def _tiled(self, model: Any, size: Tensor, first: int) -> Layout:
        """As LLaVA-NeXT, resampled to at most so many tiles."""
        shrunk = _resampled(model, size, first)
        if shrunk is None:
            return super()._tiled(model, size, first)
        patch, rows, columns = shrunk
        high, wide = _taps(patch.shape[0], rows), _taps(patch.shape[1], columns)
        four = patch[high[:, None, :, None], wide[None, :, None, :]].reshape(rows * columns, 4)
        return Layout(
            ((1, rows, columns),), torch.arange(rows * columns, dtype=torch.long, device="cpu"), four
        ).with_breaks(each_row=True)

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int | None:
        """None where features are resampled."""
        if modality == "video":
            return None
        pairs = zip(arguments["image_sizes"], self._tiles(model, arguments), strict=True)
        return None if any(n > 1 and _resampled(model, size, 0) is not None for size, n in pairs) else 1


def _taps(source: int, target: int) -> Tensor:
    """(target, 2) long, the two places of `source` that bilinear resampling to `target` places reads."""
    centre = ((torch.arange(target, dtype=torch.float32, device="cpu") + 0.5) * source / target - 0.5).clamp(min=0)
    low = centre.floor().long()
    return torch.stack([low, (low + 1).clamp(max=source - 1)], 1)


def _resampled(model: Any, size: Tensor, first: int) -> tuple[Tensor, int, int] | None:
    """The patches of the tiles and the (rows, columns) that they are resampled to; None if they are not."""
    patch = tile_patches(model, size, first)
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(patch.numel() / (most * side**2))
    if ratio <= 1.1:
        return None
    return patch, int(patch.shape[0] // ratio), int(patch.shape[1] // ratio)
