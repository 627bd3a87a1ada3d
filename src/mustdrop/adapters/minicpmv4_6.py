"""MiniCPM-V 4.6, 4.7 and MiniCPM-OCR: patches are joined 2 x 2 within the encoder and after it, before Qwen3.5."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.adapters.paddleocr_vl import packed_frames
from mustdrop.adapters.states import STATES, recurrent_layers
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout

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
        """What joins patches within the encoder, and the merger after it."""
        joining, merger = model.model.vision_tower.vit_merger, model.model.merger
        inside = 0
        if _joined(model) > 1:
            linear = linear_flops(joining.linear_1) + linear_flops(joining.linear_2)
            inside = linear + _JOINED * linear_flops(joining.self_attn)
        flops, units = 0, 1
        for mlp in reversed(merger.mlp):
            flops, units = flops + units * linear_flops(mlp), units * _JOINED
        return flops + units * inside


def _joined(model: Any, mode: str | None = None) -> int:
    """Side of the squares of patches that are joined within the encoder."""
    return 1 if (mode or model.config.downsample_mode) == "4x" else 2


class MiniCPMOcr(MiniCPMV46):
    """`MiniCPMOcrForConditionalGeneration`; patches are joined after the encoder only."""

    name = "minicpm_ocr"
    classes = ("MiniCPMOcrForConditionalGeneration",)


class MiniCPMV47(MiniCPMV46):
    """`MiniCPMV4_7ForConditionalGeneration`; tokens have places on a canvas, which markers span."""

    name = "minicpmv4_7"
    classes = ("MiniCPMV4_7ForConditionalGeneration",)
    token_types: str | None = "mm_token_type_ids"
