"""Gemma 4: images of any size, padded and pooled by the places of their patches; per-layer embeddings in the text.

Frames of a video lie one after the other on the first axis. In the sliding layers of the larger models, an image sees
both ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.cost import linear_flops
from mustdrop.errors import UnsupportedModelError
from mustdrop.layout import Layout


class Gemma4(Adapter):
    """`Gemma4ForConditionalGeneration`."""

    fixed_pictures = "its encoder takes patches, which the processor cut in an order and with positions of its own."
    name = "gemma4"
    since = "5.23"
    classes = ("Gemma4ForConditionalGeneration",)
    refuses_flash = "its sliding window would count what is left instead of positions, and images may see both ways"
    token_types = "mm_token_type_ids"
    cell_pixels = True
    row_arguments = ("per_layer_input",)
    media = {  # noqa: RUF012
        **Adapter.media,
        "video": ("get_video_features", ("pixel_values_videos",), "video_token_id"),
    }

    def check(self, model: Any) -> None:
        """Keys that several layers share (E2B, E4B) belong to the layer that made them."""
        shared = getattr(model.config.text_config, "num_kv_shared_layers", 0)
        if shared:
            raise UnsupportedModelError(
                f"the last {shared} decoder layers of this Gemma 4 read the keys and values of an earlier layer, so "
                "they have no cache of their own that could hold fewer tokens. Models without shared layers "
                "(num_kv_shared_layers=0: 26B-A4B, 31B) work."
            )

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """One tower for images and frames, padded to one length. Its layers get the place of each patch."""
        tower = model.model.vision_tower
        return Tower(tower, tower.encoder.layers, padded=True)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per image, or per video; patches are found by their (x, y), -1 on padding."""
        images = arguments[f"{modality}_position_ids"].cpu()
        pool = model.config.vision_config.pooling_kernel_size
        counts = [1] * len(images) if modality == "image" else arguments["num_frames_per_video"].tolist()
        found, first = [], 0
        for count in counts:
            frames = [self._frame(images[i], pool, i * images.shape[1]) for i in range(first, first + count)]
            (rows, columns), first = frames[0][0], first + count
            patches = torch.cat([patch for _, patch in frames])
            found.append(
                Layout(((count, rows, columns),), torch.arange(len(patches), dtype=torch.long, device="cpu"), patches)
            )
        return found

    def _frame(self, places: Tensor, pool: int, start: int) -> tuple[tuple[int, int], Tensor]:
        """((rows, columns) of features, (features, pool * pool) patches) of one item of the encoder."""
        real = (places >= 0).all(-1).nonzero()[:, 0]
        x, y = places[real].unbind(-1)
        rows, columns = (int(y.max()) + 1) // pool, (int(x.max()) + 1) // pool
        feature = y // pool * columns + x // pool
        return (rows, columns), (real[feature.argsort(stable=True)] + start).view(rows * columns, pool * pool)

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int | None:
        """None: patches leave in cells, of rows of any length."""
        return None

    def pixels(self, model: Any, modality: str, arguments: dict[str, Any]) -> Tensor:
        """The patches of all items, with their padding."""
        return arguments[self.media[modality][1][0]].flatten(0, 1)  # type: ignore[no-any-return]

    def projector_flops(self, model: Any) -> int:
        """One matrix."""
        return linear_flops(model.model.embed_vision)
