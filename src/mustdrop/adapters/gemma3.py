"""Gemma 3: average pooling behind SigLIP, image blocks that see both ways, sliding-window layers."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, stack

from mustdrop.adapters.base import Adapter
from mustdrop.adapters.tiny import IMAGE, siglip, text
from mustdrop.layout import Layout

_BEGIN, _END = 504, 505


class Gemma3(Adapter):
    """`Gemma3ForConditionalGeneration`."""

    name = "gemma3"
    classes = ("Gemma3ForConditionalGeneration",)
    token_types = "token_type_ids"
    refuses_flash = (
        "image blocks see both ways, which flash attention cannot express (the unpatched model is wrong with it too), "
        "and its sliding window would count what is left instead of positions"
    )

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A square grid of pooled patches per image."""
        encoder_grid = self.encoder_grid(model, modality, arguments)
        side = math.isqrt(model.config.mm_tokens_per_image)
        pool = self.pool(model, modality, arguments)
        images = range(len(arguments["pixel_values"]))
        return [Layout.of_frames((1, side, side), encoder_grid, i, pool=pool) for i in images]

    def pool(self, model: Any, modality: str, arguments: dict[str, Any]) -> int:
        """Side of the average pooling."""
        side = model.config.vision_config.image_size // model.config.vision_config.patch_size
        return int(side // math.isqrt(model.config.mm_tokens_per_image))

    def projector_flops(self, model: Any) -> int:
        """One matrix."""
        return 2 * int(model.model.multi_modal_projector.mm_input_projection_weight.numel())

    def tiny(self) -> dict[str, Any]:
        """Three of five decoder layers see 16 tokens back."""
        kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        return {
            "model_type": "gemma3",
            "vision_config": siglip(image_size=48),
            "text_config": text("gemma3_text", sliding_window=16, query_pre_attn_scalar=16, layer_types=kinds),
            "image_token_id": IMAGE,
            "boi_token_index": _BEGIN,
            "eoi_token_index": _END,
            "mm_tokens_per_image": 36,
            "tie_word_embeddings": False,
        }

    def tiny_media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """36 tokens per image between its markers."""
        return {"pixel_values": stack(images)}, [[_BEGIN, *[IMAGE] * 36, _END] for _ in images]

    def tiny_sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """One size."""
        return ((3, 48, 48),)
