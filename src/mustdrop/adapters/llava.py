"""LLaVA-1.5 and families of that kind: CLIP or SigLIP tower, two-layer projector, any Llama-like text model."""

from __future__ import annotations

from typing import Any, Literal

import torch

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.errors import ConfigError, UnsupportedModelError
from mustdrop.layout import Layout

_TOWERS = ("clip_vision_model", "siglip_vision_model", "pixtral")


class Llava(Adapter):
    """`LlavaForConditionalGeneration`."""

    name = "llava"
    classes = ("LlavaForConditionalGeneration",)

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """CLIP or SigLIP, or Pixtral with all images in one sequence."""
        kind = model.config.vision_config.model_type
        if kind not in _TOWERS:
            raise UnsupportedModelError(
                f"the vision stage of the llava adapter knows {', '.join(_TOWERS)} towers, not {kind}. "
                "Leave the vision stage out: mustdrop.patch(model, prefill=PrefillPruner(...), "
                "decode=DecodeCachePruner())."
            )
        tower = model.model.vision_tower
        if kind == "pixtral":
            return Tower(tower, tower.transformer.layers, packed=True)
        return self.dense_tower(tower)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per image, as large as its pixels; strategy "full" leaves the CLS row in front of the patches."""
        special = _special_tokens(model.model.vision_tower)
        strategy = arguments.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
        if strategy == "default" and not special:
            raise ConfigError(
                'vision_feature_select_strategy="default" cuts the first patch of a tower without a CLS token: '
                'use "full" for this model.'
            )
        prefix = special - (strategy == "default")
        found, start = [], 0
        for rows, columns in _grids(model, arguments):
            before, rest = divmod(start, rows * columns)
            one = Layout.of_frames((1, rows, columns), (rows, columns), before, prefix=prefix)
            if rest:  # images of other sizes come before this one
                one = Layout(one.grids, one.cells, torch.where(one.patches < 0, -1, one.patches + rest))
            found.append(one)
            start += rows * columns
        return found

    def fit(self, model: Any) -> Literal["crop", "stretch"]:
        """CLIP's processor crops the centre, SigLIP's stretches."""
        return "crop" if model.config.vision_config.model_type == "clip_vision_model" else "stretch"


def _special_tokens(tower: Any) -> int:
    """Tokens that the tower puts before the patches: CLS, and registers where it has such."""
    kind = tower.config.model_type
    if kind in _TOWERS:
        return int(kind.startswith("clip"))
    names = {name.rpartition(".")[2] for name, _ in tower.named_parameters()}
    cls = not names.isdisjoint(("class_embedding", "cls_token"))
    return int(cls) + int(getattr(tower.config, "num_register_tokens", 0) or 0)


def _grids(model: Any, arguments: dict[str, Any]) -> list[tuple[int, int]]:
    """(rows, columns) of the patches of each image: of its own size where sizes are given, else of all its pixels."""
    pixels, sizes = arguments["pixel_values"], arguments.get("image_sizes")
    if sizes is None:
        known = [tuple(pixels.shape[-2:])] * len(pixels)
    else:
        known = torch.as_tensor(sizes, dtype=torch.long, device="cpu").tolist()
    side = model.config.vision_config.patch_size
    high, wide = side if isinstance(side, list | tuple) else (side, side)
    return [(height // high, width // wide) for height, width in known]
