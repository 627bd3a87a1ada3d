"""MiniCPM-V 4.6, 4.7 and MiniCPM-OCR: patches are joined 2 x 2 within the encoder and behind it, before Qwen3.5."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.adapters.minicpmv4_6 import MiniCPMOcr, MiniCPMV46, MiniCPMV47, _joined
from tests.families.base import IMAGE, VIDEO, Family, tokens, tower
from tests.families.qwen3_5 import tiny_qwen35

_START, _END = 502, 503


class MiniCPMV46Family(Family):
    """See `MiniCPMV46`."""

    of = MiniCPMV46

    def config(self) -> dict[str, Any]:
        """Five encoder layers, the first two before patches are joined."""
        vision = tower("minicpmv4_6_vision", num_hidden_layers=5, insert_layer_id=1, image_size=32)
        decoder = {**tiny_qwen35("qwen3_5")["text_config"], "model_type": "qwen3_5_text"}
        return {
            "model_type": "minicpmv4_6",
            "vision_config": vision,
            "insert_layer_id": 1,
            "text_config": decoder,
            "image_size": 32,
            "tie_word_embeddings": False,
            **tokens(),
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Patches of 4 x 4 pixels side by side (1, 3, 4, N), and the grid of each frame."""
        frames = [image if image.ndim == 4 else image[None] for image in images]
        strips = [rearrange(some, "t c (h p) (w q) -> c p (t h w q)", p=4, q=4) for some in frames]
        grids = [(some.shape[-2] // 4, some.shape[-1] // 4) for some in frames for _ in some]
        ending, token = ("", IMAGE) if modality == "image" else ("_videos", VIDEO)
        arguments = {
            f"pixel_values{ending}": torch.cat(strips, -1)[None],
            f"target_sizes{ending}": torch.tensor(grids, dtype=torch.int32, device="cpu"),
        }
        runs = []
        for some in frames:
            own = [_START, *[token] * (some.shape[-2] * some.shape[-1] // (8 * _joined(model)) ** 2), _END]
            runs.append([i for _ in some for i in own])
        return arguments, runs

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Grids of 4 x 4, 3 x 5 and 5 x 3 features; of a video one frame, since each is a medium."""
        if modality == "image":
            return ((3, 64, 64), (3, 48, 80), (3, 80, 48))
        return ((1, 3, 48, 64), (1, 3, 64, 48))


class MiniCPMOcrFamily(MiniCPMV46Family):
    """See `MiniCPMOcr`."""

    of = MiniCPMOcr

    def config(self) -> dict[str, Any]:
        """The same under its own names."""
        made = super().config()
        vision = {**made["vision_config"], "model_type": "minicpm_ocr_vision"}
        return {**made, "model_type": "minicpm_ocr", "vision_config": vision}


class MiniCPMV47Family(MiniCPMV46Family):
    """See `MiniCPMV47`."""

    of = MiniCPMV47

    def config(self) -> dict[str, Any]:
        """The same with the ids of the markers."""
        made = super().config()
        markers = ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id", "newline_id")
        vision = {**made["vision_config"], "model_type": "minicpmv4_7_vision"}
        ids = dict(zip(markers, range(_START, _START + len(markers)), strict=True))
        return {**made, "model_type": "minicpmv4_7", "vision_config": vision, **ids}
