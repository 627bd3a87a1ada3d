"""Kimi K2.5: packed patches in raster order, and a text model whose cache holds compressed keys and values (MLA)."""

from __future__ import annotations

from typing import Any

from mustdrop.adapters.kimi_k25 import KimiK25
from tests.families.base import text, tokens
from tests.families.paddleocr_vl import PaddleOCRVLFamily


class KimiK25Family(PaddleOCRVLFamily):
    """See `KimiK25`."""

    of = KimiK25

    def config(self) -> dict[str, Any]:
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
