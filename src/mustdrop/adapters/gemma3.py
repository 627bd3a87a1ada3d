"""Gemma 3: average pooling after SigLIP, image blocks that see both ways, sliding-window layers."""

from __future__ import annotations

import math
from typing import Any

from mustdrop.adapters.base import Adapter


class Gemma3(Adapter):
    """`Gemma3ForConditionalGeneration`."""

    name = "gemma3"
    classes = ("Gemma3ForConditionalGeneration",)
    token_types = "token_type_ids"
    refuses_flash = (
        "image blocks see both ways, which flash attention cannot express (the unpatched model is wrong with it too), "
        "and its sliding window would count what is left instead of positions"
    )

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """Side of the average pooling."""
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        return int(side // math.isqrt(model.config.mm_tokens_per_image))

    def projector_flops(self, model: Any) -> int:
        """One matrix."""
        return 2 * int(model.model.multi_modal_projector.mm_input_projection_weight.numel())
