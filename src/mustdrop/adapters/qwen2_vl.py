"""Qwen2-VL, Qwen2.5-VL: images of any size, packed into one sequence, 2 x 2 patches to a feature, M-RoPE."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout


class Qwen2VL(Adapter):
    """`Qwen2VLForConditionalGeneration`."""

    name = "qwen2_vl"
    classes: tuple[str, ...] = ("Qwen2VLForConditionalGeneration",)
    token_types: str | None = "mm_token_type_ids"
    cell_pixels = True
    media = {  # noqa: RUF012
        **Adapter.media,
        "video": ("get_video_features", ("pixel_values_videos",), "video_token_id"),
    }

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """One tower for images and videos."""
        visual = model.model.visual
        return packed_tower(visual)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """(frames, rows, columns) of features per medium; the patches of a feature follow one another."""
        merge = model.config.vision_config.spatial_merge_size
        found, start = [], 0
        for frames, rows, columns in arguments[f"{modality}_grid_thw"].tolist():
            grid = (frames, rows // merge, columns // merge)
            place = self.order(model, grid) + start
            unit = merge * merge
            patches = place[:, None] * unit + torch.arange(unit, dtype=torch.long, device="cpu")
            found.append(Layout((grid,), torch.arange(len(place), dtype=torch.long, device="cpu"), patches))
            start += len(place)
        return found

    def order(self, model: Any, grid: tuple[int, int, int]) -> Tensor:
        """(features,) long, where each feature's patches are in the encoder's sequence, counted in features."""
        return torch.arange(grid[0] * grid[1] * grid[2], dtype=torch.long, device="cpu")

    def pixel_rows(self, model: Any, modality: str, arguments: dict[str, Any]) -> Tensor | None:
        """The encoder may put its features into another order than the processor."""
        merge, start, pieces = model.config.vision_config.spatial_merge_size, 0, []
        for t, h, w in arguments[f"{modality}_grid_thw"].tolist():
            place = self.order(model, (t, h // merge, w // merge)).argsort() + start
            pieces.append(place)
            start += len(place)
        cells, inside = torch.cat(pieces), torch.arange(merge * merge, dtype=torch.long, device="cpu")
        rows: Tensor = (cells[:, None] * merge * merge + inside).flatten()
        return rows

    def resized(
        self, model: Any, modality: str, arguments: dict[str, Any], sizes: list[tuple[int, int]]
    ) -> dict[str, Any] | None:
        """Patches of pictures that are put together, resized, and cut again, with their grids."""
        vision, name = model.config.vision_config, f"{modality}_grid_thw"
        (pixels,) = [key for key in self.media[modality][1] if arguments.get(key) is not None]
        side, merge = vision.patch_size, vision.spatial_merge_size
        grids, pieces = arguments[name].tolist(), []
        rows = arguments[pixels].split([t * h * w for t, h, w in grids])
        for patches, (t, h, w), (high, wide) in zip(rows, grids, sizes, strict=True):
            if (h, w) == (high * merge, wide * merge):
                pieces.append(patches)
                continue
            order = {"a": merge, "b": merge, "p": side, "q": side, "t": t, "c": vision.in_channels}
            picture = rearrange(
                patches.float(), "(t h w a b) (c k p q) -> (t k) c (h a p) (w b q)", h=h // merge, w=w // merge, **order
            )
            picture = torch.nn.functional.interpolate(
                picture, (high * merge * side, wide * merge * side), mode="bilinear", antialias=True
            )
            made = rearrange(picture, "(t k) c (h a p) (w b q) -> (t h w a b) (c k p q)", **order)
            pieces.append(made.to(patches.dtype))
        made_grids = [[t, high * merge, wide * merge] for (t, _, _), (high, wide) in zip(grids, sizes, strict=True)]
        return {pixels: torch.cat(pieces), name: arguments[name].new_tensor(made_grids)}

    def projector_flops(self, model: Any) -> int:
        """The merger."""
        return linear_flops(model.model.visual.merger)


class Qwen25VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration`: most blocks attend within windows, which the encoder puts side by side."""

    name = "qwen2_5_vl"
    classes = ("Qwen2_5_VLForConditionalGeneration",)

    def order(self, model: Any, grid: tuple[int, int, int]) -> Tensor:
        """Features sorted by window, in raster order inside each."""
        vision = model.config.vision_config
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        frames, rows, columns = (torch.arange(n, dtype=torch.long, device="cpu") for n in grid)
        t, i, j = torch.meshgrid(frames, rows, columns, indexing="ij")
        windows = ((t * (len(rows) // side + 1) + i // side) * (len(columns) // side + 1) + j // side).flatten()
        # stable: inside a window the raster order stays
        place: Tensor = windows.argsort(stable=True).argsort()
        return place


def packed_tower(visual: Any) -> Tower:
    """A tower of blocks and of mergers that take cell after cell; some blocks may see windows only."""
    whole = tuple(getattr(visual, "fullatt_block_indexes", ()))
    mergers = _mergers(visual)
    return Tower(visual, visual.blocks, packed=True, whole=whole, mergers=mergers, embeds=visual.patch_embed)


def _mergers(visual: Any) -> tuple[nn.Module, ...]:
    lists = getattr(visual, "deepstack_merger_list", getattr(visual, "merger_list", []))
    return visual.merger, *lists
