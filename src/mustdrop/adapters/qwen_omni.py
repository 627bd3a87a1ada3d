"""Qwen2.5-Omni and Qwen3-Omni, the thinker: a Qwen-VL that hears as well; audio tokens are text to mustdrop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mustdrop.adapters.base import Tower
from mustdrop.adapters.qwen2_vl import Qwen25VL, packed_tower
from mustdrop.adapters.qwen3_vl import Qwen3VLMoe
from mustdrop.cost import linear_flops

_START, _END, _AUDIO, _AUDIO_START, _AUDIO_END = 502, 503, 506, 507, 508


class Qwen25Omni(Qwen25VL):
    """`Qwen2_5OmniThinkerForConditionalGeneration`; of the whole model, patch `model.thinker`."""

    name = "qwen2_5_omni_thinker"
    since = "5.23"
    classes = ("Qwen2_5OmniThinkerForConditionalGeneration",)
    token_types: str | None = None

    def base(self, model: Any) -> nn.Module:
        """What owns the towers."""
        module: nn.Module = seeing(model)
        return module

    def text(self, model: Any) -> nn.Module:
        """The text model."""
        module: nn.Module = reading(model)
        return module

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """One tower for images and videos."""
        return packed_tower(seeing(model).visual)

    def projector_flops(self, model: Any) -> int:
        """The merger."""
        return linear_flops(seeing(model).visual.merger)

    def tiny(self) -> dict[str, Any]:
        """As Qwen2.5-VL, with one layer that hears."""
        made = super().tiny()
        del made["vision_config"]["tokens_per_second"]
        made["text_config"]["initializer_range"] = 0.2
        return tiny_omni(made, "qwen2_5_omni_thinker")

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Videos say how many seconds a frame lasts."""
        arguments, runs = super().tiny_media(model, modality, images)
        return with_seconds(arguments, modality, len(images)), runs


class Qwen3Omni(Qwen3VLMoe):
    """`Qwen3OmniMoeThinkerForConditionalGeneration`; of the whole model, patch `model.thinker`."""

    name = "qwen3_omni_moe_thinker"
    since = "5.23"
    classes = ("Qwen3OmniMoeThinkerForConditionalGeneration",)
    token_types: str | None = None

    def base(self, model: Any) -> nn.Module:
        """What owns the towers."""
        module: nn.Module = seeing(model)
        return module

    def text(self, model: Any) -> nn.Module:
        """The text model."""
        module: nn.Module = reading(model)
        return module

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """One tower for images and videos."""
        return packed_tower(seeing(model).visual)

    def projector_flops(self, model: Any) -> int:
        """The mergers."""
        return linear_flops(nn.ModuleList([seeing(model).visual.merger, *merger_list(seeing(model).visual)]))

    def tiny(self) -> dict[str, Any]:
        """As Qwen3-VL, with one layer that hears."""
        return tiny_omni(super().tiny(), "qwen3_omni_moe_thinker")

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Videos say how many seconds a frame lasts."""
        arguments, runs = super().tiny_media(model, modality, images)
        return with_seconds(arguments, modality, len(images)), runs

    def tiny_run(self, token: int, frames: int, per_frame: int) -> list[int]:
        """No timestamps."""
        return [_START, *[token] * (frames * per_frame), _END]


def seeing(model: Any) -> Any:
    """The module that owns the towers: the base model, or before transformers 5.23 the thinker itself."""
    return model.model if hasattr(model.model, "visual") else model


def reading(model: Any) -> Any:
    """The text model."""
    return getattr(model.model, "language_model", model.model)


def merger_list(visual: Any) -> list[nn.Module]:
    """The mergers of DeepStack, under either of their names."""
    return list(getattr(visual, "deepstack_merger_list", None) or getattr(visual, "merger_list", []))


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
