"""Pixtral in the format of transformers, which is a LLaVA with another tower: the tokens of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from mustdrop.integrations.vllm import settings
from support import engines
from support import tiny_checkpoints as tiny
from support.engines import Request
from tests.families.base import IMAGE

SIDE = tiny.TILE
PROMPTS = "mistral3"  # images are named alike


def save(folder):
    """Write a checkpoint; the model in float32 and its processor."""
    pixtral = tiny.config("mistral3")
    config = transformers.LlavaConfig(
        text_config=pixtral["text_config"],
        vision_config=pixtral["vision_config"],
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    made = transformers.LlavaForConditionalGeneration._from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    made.generation_config.eos_token_id = None
    processor = tiny.mistral3(PROMPTS)
    processor.spatial_merge_size = 1
    processor.image_processor.patch_size = {"height": 4, "width": 4}
    for one in (made, processor):
        one.save_pretrained(folder)
    return made, processor


@pytest.mark.parametrize("method", ["divprune", "fastervlm"])  # the second reads attention in the packed sequence
def test_tokens_are_those_of_transformers_also_from_the_prefix_cache(method, tmp_path):
    model, processor = save(tmp_path)
    given = {"method": method, "keep": 0.5}
    asked = [
        Request("w6 w7", [tiny.picture(0, SIDE, SIDE // 2)]),
        Request("w9 w8", [tiny.picture(1, SIDE // 2, SIDE)]),
        Request("w12 w13 w14 w15"),
        Request("w11", [tiny.picture(2, SIDE // 2, SIDE // 2), tiny.picture(3, SIDE, SIDE // 2)]),
    ]
    pruner = settings.parse(given).pruner
    expected = [engines.reference(model, processor, PROMPTS, one, pruner)[0] for one in asked]
    with engines.engine(tmp_path, "LlavaForConditionalGeneration", given, block_size=32) as llm:
        for _ in range(2):
            answered = engines.answers(llm, PROMPTS, asked)
            assert engines.tokens(answered) == expected
        assert any(one.num_cached_tokens for one in answered)
