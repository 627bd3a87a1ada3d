"""LLaVA-1.5 and its kin: CLIP or SigLIP tower, two-layer projector, any Llama-like text model."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from mustdrop.adapters.base import Adapter, ImageLayout, Tower
from mustdrop.errors import ConfigError, UnsupportedModelError

_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # tokens before the patches


class Llava(Adapter):
    """`LlavaForConditionalGeneration`."""

    name = "llava"
    classes = ("LlavaForConditionalGeneration",)

    def base(self, model: Any) -> nn.Module:
        """`model.model`."""
        return model.model  # type: ignore[no-any-return]

    def text(self, model: Any) -> nn.Module:
        """`model.model.language_model`."""
        return model.model.language_model  # type: ignore[no-any-return]

    def tower(self, model: Any) -> Tower:
        """The CLIP or SigLIP tower. Its layers sit one level deeper before transformers 5.6, hence the search."""
        kind = model.config.vision_config.model_type
        if kind not in _TOWERS:
            raise UnsupportedModelError(
                f"the vision stage of the llava adapter knows {', '.join(_TOWERS)} towers, not {kind}. "
                "Leave the vision stage out: mustdrop.patch(model, prefill=PrefillPruner(...), "
                "decode=DecodeCachePruner())."
            )
        module = model.model.vision_tower
        depth = module.config.num_hidden_layers
        (blocks,) = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        return Tower(module, blocks, _TOWERS[kind], _TOWERS[kind] > 0)

    def placeholder_ids(self, model: Any) -> tuple[int, ...]:
        """The one image token."""
        return (model.config.image_token_id,)

    def layouts(self, model: Any, arguments: dict[str, Any]) -> list[ImageLayout]:
        """A square grid per image; strategy "full" leaves the CLS row in front of the patches."""
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        strategy = arguments.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
        prefix = _TOWERS.get(vision.model_type, 0) if strategy == "full" else 0
        if strategy == "default" and not _TOWERS.get(vision.model_type, 0):
            raise ConfigError(
                'vision_feature_select_strategy="default" cuts the first patch of a tower without a CLS token: '
                'use "full" for this model.'
            )
        return [ImageLayout((side, side), prefix) for _ in range(len(arguments["pixel_values"]))]

    def read_layer(self, model: Any, arguments: dict[str, Any]) -> int:
        """The deepest of the feature layers; `hidden_states[k]` is the output of layer k - 1."""
        layers = arguments.get("vision_feature_layer")
        layers = model.config.vision_feature_layer if layers is None else layers
        depth = model.config.vision_config.num_hidden_layers
        return max(k - 1 if k >= 0 else depth + k for k in ([layers] if isinstance(layers, int) else layers))

    def projector(self, model: Any) -> nn.Module:
        """`model.model.multi_modal_projector`."""
        return model.model.multi_modal_projector  # type: ignore[no-any-return]

    def fit(self, model: Any) -> Literal["crop", "stretch"]:
        """CLIP's processor crops the centre, SigLIP's stretches."""
        return "crop" if model.config.vision_config.model_type == "clip_vision_model" else "stretch"
