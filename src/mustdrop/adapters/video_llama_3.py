"""VideoLLaMA 3: packed patches with a merge size per image or video, bilinear merging, plain positions in the text.

Where `video_compression_mask` takes features of a video away before the text model, the vision stage has decided before
that: its budget counts the features of the video and not its tokens, and the trace cannot place them.
"""

from __future__ import annotations

from typing import Any

import torch

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout


class VideoLlama3(Adapter):
    """`VideoLlama3ForConditionalGeneration`."""

    fixed_pictures = "its encoder takes patches, which the processor cut in an order and with positions of its own."
    name = "video_llama_3"
    classes = ("VideoLlama3ForConditionalGeneration",)
    cell_pixels = True
    media = {  # noqa: RUF012
        **Adapter.media,
        "video": ("get_video_features", ("pixel_values_videos",), "video_token_id"),
    }

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """One packed tower."""
        visual = model.model.vision_model
        return Tower(visual, visual.encoder.layers, packed=True, embeds=visual.embeddings.patch_embedding)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """(frames, rows, columns) of features per medium; the patches of a feature follow one another."""
        found, start = [], 0
        grids, merges = arguments[f"{modality}_grid_thw"], arguments[f"{modality}_merge_sizes"]
        for (frames, rows, columns), merge in zip(grids.tolist(), merges.tolist(), strict=True):
            grid = (frames, rows // merge, columns // merge)
            size = grid[0] * grid[1] * grid[2]
            patches = start + torch.arange(size * merge * merge, dtype=torch.long, device="cpu").view(
                size, merge * merge
            )
            found.append(Layout((grid,), torch.arange(size, dtype=torch.long, device="cpu"), patches))
            start += patches.numel()
        kept = arguments.get("video_compression_mask") if modality == "video" else None
        if kept is not None:  # of a whole prompt, not of the encoder
            parts = zip(found, kept.cpu().split([layout.size for layout in found]), strict=True)
            found = [Layout(layout.grids, layout.cells[part], layout.patches[part]) for layout, part in parts]
        return found

    def projector_flops(self, model: Any) -> int:
        """The projector."""
        return linear_flops(model.model.projector)
