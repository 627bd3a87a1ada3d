"""MiniCPM-V 4.6, 4.7 and MiniCPM-OCR: patches are joined 2 x 2 within the encoder and behind it, before Qwen3.5."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.adapters.paddleocr_vl import packed_frames
from mustdrop.adapters.qwen3_5 import tiny_qwen35
from mustdrop.adapters.states import STATES, recurrent_layers
from mustdrop.adapters.tiny import IMAGE, VIDEO, tokens, tower
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout

_START, _END = 502, 503
_JOINED = 4  # patches that become one within the encoder


class MiniCPMV46(Adapter):
    """`MiniCPMV4_6ForConditionalGeneration`; each tile of a picture and each frame is a medium of its own."""

    name = "minicpmv4_6"
    classes: tuple[str, ...] = ("MiniCPMV4_6ForConditionalGeneration",)
    since = "5.23"
    lacks = STATES
    fixed_pictures = "its encoder takes patches of all pictures side by side, which the processor has cut."
    media = {  # noqa: RUF012
        **Adapter.media,
        "video": ("get_video_features", ("pixel_values_videos",), "video_token_id"),
    }

    def recurrent(self, model: Any) -> tuple[int, ...]:
        """The layers of linear attention."""
        return recurrent_layers(model.config.text_config)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """Patches are those that are left after they were joined in the encoder."""
        visual = model.model.vision_tower
        first = visual.config.insert_layer_id + 1
        return Tower(visual, visual.encoder.layers[first:], packed=True, before=tuple(visual.encoder.layers[:first]))

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per tile or frame, its patches row by row."""
        joined = _joined(model, arguments.get("downsample_mode"))
        side = int(model.config.merge_kernel_size[0]) ** int(model.config.merger_times)
        name = "target_sizes" if modality == "image" else "target_sizes_videos"
        sizes = arguments.get(name, arguments.get("target_sizes"))
        assert sizes is not None, f"{name} is a required argument"
        return packed_frames([[1, rows // joined, columns // joined] for rows, columns in sizes.tolist()], side)

    def projector_flops(self, model: Any) -> int:
        """What joins patches within the encoder, and the merger behind it."""
        joining, merger = model.model.vision_tower.vit_merger, model.model.merger
        inside = 0
        if _joined(model) > 1:
            linear = linear_flops(joining.linear_1) + linear_flops(joining.linear_2)
            inside = linear + _JOINED * linear_flops(joining.self_attn)
        flops, units = 0, 1
        for mlp in reversed(merger.mlp):
            flops, units = flops + units * linear_flops(mlp), units * _JOINED
        return flops + units * inside

    def tiny(self) -> dict[str, Any]:
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

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
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

    def tiny_sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Grids of 4 x 4, 3 x 5 and 5 x 3 features; of a video one frame, since each is a medium."""
        if modality == "image":
            return ((3, 64, 64), (3, 48, 80), (3, 80, 48))
        return ((1, 3, 48, 64), (1, 3, 64, 48))


def _joined(model: Any, mode: str | None = None) -> int:
    """Side of the squares of patches that are joined within the encoder."""
    return 1 if (mode or model.config.downsample_mode) == "4x" else 2


class MiniCPMOcr(MiniCPMV46):
    """`MiniCPMOcrForConditionalGeneration`; patches are joined behind the encoder only."""

    name = "minicpm_ocr"
    classes = ("MiniCPMOcrForConditionalGeneration",)

    def tiny(self) -> dict[str, Any]:
        """The same under its own names."""
        made = super().tiny()
        vision = {**made["vision_config"], "model_type": "minicpm_ocr_vision"}
        return {**made, "model_type": "minicpm_ocr", "vision_config": vision}


class MiniCPMV47(MiniCPMV46):
    """`MiniCPMV4_7ForConditionalGeneration`; tokens have places on a canvas, which markers span."""

    name = "minicpmv4_7"
    classes = ("MiniCPMV4_7ForConditionalGeneration",)
    token_types: str | None = "mm_token_type_ids"

    def tiny(self) -> dict[str, Any]:
        """The same with the ids of the markers."""
        made = super().tiny()
        markers = ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id", "newline_id")
        vision = {**made["vision_config"], "model_type": "minicpmv4_7_vision"}
        ids = dict(zip(markers, range(_START, _START + len(markers)), strict=True))
        return {**made, "model_type": "minicpmv4_7", "vision_config": vision, **ids}
