"""LLaVA-1.5 and its kin: CLIP or SigLIP tower, two-layer projector, any Llama-like text model."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, stack

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.adapters.tiny import IMAGE, clip, text
from mustdrop.errors import ConfigError, UnsupportedModelError
from mustdrop.layout import Layout

_TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(Adapter):
    """`LlavaForConditionalGeneration`."""

    name = "llava"
    classes = ("LlavaForConditionalGeneration",)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """The CLIP or SigLIP tower."""
        kind = model.config.vision_config.model_type
        if kind not in _TOWERS:
            raise UnsupportedModelError(
                f"the vision stage of the llava adapter knows {', '.join(_TOWERS)} towers, not {kind}. "
                "Leave the vision stage out: mustdrop.patch(model, prefill=PrefillPruner(...), "
                "decode=DecodeCachePruner())."
            )
        return self.dense_tower(model.model.vision_tower)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A square grid per image; strategy "full" leaves the CLS row in front of the patches."""
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        cls = int(vision.model_type.startswith("clip"))
        strategy = arguments.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
        if strategy == "default" and not cls:
            raise ConfigError(
                'vision_feature_select_strategy="default" cuts the first patch of a tower without a CLS token: '
                'use "full" for this model.'
            )
        prefix = cls if strategy == "full" else 0
        images = range(len(arguments["pixel_values"]))
        return [Layout.of_frames((1, side, side), (side, side), i, prefix=prefix) for i in images]

    def fit(self, model: Any) -> Literal["crop", "stretch"]:
        """CLIP's processor crops the centre, SigLIP's stretches."""
        return "crop" if model.config.vision_config.model_type == "clip_vision_model" else "stretch"

    def tiny(self) -> dict[str, Any]:
        """CLIP and Llama."""
        return {
            "model_type": "llava",
            "vision_config": clip(),
            "text_config": text("llama"),
            "image_token_id": IMAGE,
            "image_seq_length": 36,
        }

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per image."""
        return {"pixel_values": stack(images)}, [[IMAGE] * 36 for _ in images]
