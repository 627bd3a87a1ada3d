"""A static cache of a patched model: the same numbers as with a growing one, and less room."""

from __future__ import annotations

import pytest
import torch
import transformers

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from support.builders import LLAMA, MISTRAL, QWEN2, SIGLIP, answer, batch, plain
from support.checks import assert_dropping_equals_masking, distance, patched

THRESHOLDS = PrefillPruner(global_threshold=0.02, individual_threshold=0.02)
SETUPS = {
    "prefill": {"prefill": THRESHOLDS},
    "prefill and cascade": {"prefill": PrefillPruner(keep=0.4), "decode": DecodeCachePruner()},
    "cascade from layer 0": {"prefill": THRESHOLDS, "decode": DecodeCachePruner(full_layers=0)},
    "vision": {"vision": VisionStagePruner(window=3, keep=10)},
    "all three": {"vision": VisionStagePruner(), "prefill": PrefillPruner(keep=1 / 3), "decode": DecodeCachePruner()},
}


def static(model, length=160):
    return transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=length)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [(1,), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("how", ["implementation", "object"])
def test_dropping_equals_masking(setup, images, attn, how):
    pruners = SETUPS[setup]
    model, inputs = patched(LLAMA, attn, **pruners), batch(LLAMA, images, seed=3)
    cache = {"cache_implementation": "static"} if how == "implementation" else {"past_key_values": static(model)}
    chosen = {name: pruners[name] for name in ("vision", "decode") if name in pruners}
    both = assert_dropping_equals_masking(model, inputs, LLAMA, attn, **chosen, **cache)
    assert isinstance(both.ours.cache, transformers.StaticCache)
