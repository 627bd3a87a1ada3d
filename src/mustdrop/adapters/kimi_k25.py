"""Kimi K2.5: packed patches in raster order, and a text model whose cache holds compressed keys and values (MLA)."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.base import Tower
from mustdrop.adapters.paddleocr_vl import PaddleOCRVL, packed_frames
from mustdrop.adapters.tiny import text, tokens
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout


class KimiK25(PaddleOCRVL):
    """`Kimi_K25ForConditionalGeneration`, images only: transformers 5.23 cannot split the features of longer videos."""

    name = "kimi_k25"
    since = "5.23"
    classes = ("Kimi_K25ForConditionalGeneration",)
    token_types: str | None = None

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """`model.model.vision_tower`."""
        visual = model.model.vision_tower
        return Tower(visual, visual.layers, packed=True)

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """A grid per image."""
        return packed_frames(arguments["image_grid_thw"].tolist(), model.config.vision_config.merge_kernel_size[0])

    def projector_flops(self, model: Any) -> int:
        """The projector."""
        return linear_flops(model.model.mm_projector)

    def tiny(self) -> dict[str, Any]:
        """DeepSeek-V3 with four experts after one dense layer."""
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "patch_size": 4,
            "pos_emb_height": 6,
            "pos_emb_width": 6,
        }
        latent = {
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        }
        experts = {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        }
        decoder = text("deepseek_v3", **{**latent, **experts, "initializer_range": 0.25})
        del decoder["head_dim"]
        return {
            "model_type": "kimi_k25",
            "vision_config": vision,
            "text_config": decoder,
            "projection_hidden_size": 32,
            "tie_word_embeddings": False,
            **tokens(vision_start_token_id=502, vision_end_token_id=503),
        }
