"""VideoLLaMA 3: packed patches with a merge size per image or video, bilinear merging, plain positions in the text."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.adapters.video_llama_3 import VideoLlama3
from tests.families.base import IMAGE, VIDEO, Family, text, tokens, tower


class VideoLlama3Family(Family):
    """See `VideoLlama3`."""

    of = VideoLlama3

    def config(self) -> dict[str, Any]:
        """A SigLIP with rotary embeddings, and Qwen2."""
        return {
            "model_type": "video_llama_3",
            "vision_config": tower("video_llama_3_vision"),
            "text_config": text("qwen2"),
            "tie_word_embeddings": False,
            **tokens(),
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Images whole, videos merged by 2 x 2."""
        merge = 1 if modality == "image" else 2
        token = IMAGE if modality == "image" else VIDEO
        pixels, grids = [], []
        for image in images:
            frames = image[None] if image.ndim == 3 else image
            pattern = "t c (h a p) (w b q) -> (t h w a b) (c p q)"
            pixels.append(rearrange(frames, pattern, a=merge, b=merge, p=4, q=4))
            grids.append([len(frames), frames.shape[-2] // 4, frames.shape[-1] // 4])
        arguments = {
            "pixel_values" if modality == "image" else "pixel_values_videos": torch.cat(pixels),
            f"{modality}_grid_thw": torch.tensor(grids, dtype=torch.long, device="cpu"),
            f"{modality}_merge_sizes": torch.full((len(images),), merge, dtype=torch.long, device="cpu"),
        }
        runs = []
        for count, rows, columns in grids:
            run = []
            for t in range(count):
                run += [*([10 + t] if modality == "video" else []), *[token] * (rows * columns // merge**2)]
            runs.append(run)
        return arguments, runs

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Two sizes of image; two or three frames."""
        return ((3, 24, 24), (3, 16, 32)) if modality == "image" else ((3, 3, 24, 32), (2, 3, 24, 24))
