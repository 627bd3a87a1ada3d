"""Qwen2.5-Omni and Qwen3-Omni, the thinker: a Qwen-VL that hears as well; audio tokens are text to mustdrop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mustdrop.adapters.qwen_omni import Qwen3Omni, Qwen25Omni
from tests.families.qwen2_vl import Qwen25VLFamily
from tests.families.qwen3_vl import Qwen3VLMoeFamily

_START, _END, _AUDIO, _AUDIO_START, _AUDIO_END = 502, 503, 506, 507, 508


class Qwen25OmniFamily(Qwen25VLFamily):
    """See `Qwen25Omni`."""

    of = Qwen25Omni

    def config(self) -> dict[str, Any]:
        """As Qwen2.5-VL, with one layer that hears."""
        made = super().config()
        del made["vision_config"]["tokens_per_second"]
        made["text_config"]["initializer_range"] = 0.2
        return tiny_omni(made, "qwen2_5_omni_thinker")

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Videos say how many seconds a frame lasts."""
        arguments, runs = super().media(model, modality, images)
        return with_seconds(arguments, modality, len(images)), runs


class Qwen3OmniFamily(Qwen3VLMoeFamily):
    """See `Qwen3Omni`."""

    of = Qwen3Omni

    def config(self) -> dict[str, Any]:
        """As Qwen3-VL, with one layer that hears."""
        return tiny_omni(super().config(), "qwen3_omni_moe_thinker")

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Videos say how many seconds a frame lasts."""
        arguments, runs = super().media(model, modality, images)
        return with_seconds(arguments, modality, len(images)), runs

    def run(self, token: int, frames: int, per_frame: int) -> list[int]:
        """No timestamps."""
        return [_START, *[token] * (frames * per_frame), _END]


def with_seconds(arguments: dict[str, Any], modality: str, media: int) -> dict[str, Any]:
    """The arguments of videos with the seconds of each temporal patch."""
    return (
        arguments
        if modality == "image"
        else {**arguments, "video_second_per_grid": torch.ones(media, dtype=torch.float32, device="cpu")}
    )


def tiny_omni(made: dict[str, Any], kind: str) -> dict[str, Any]:
    """A tiny configuration made that of a thinker."""
    audio = {
        "num_mel_bins": 8,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "d_model": 16,
        "n_window": 4,
        "output_dim": 64,
    }
    ids = {"audio_token_id": _AUDIO, "audio_start_token_id": _AUDIO_START, "audio_end_token_id": _AUDIO_END}
    return {**made, "model_type": kind, "audio_config": audio, **ids}
