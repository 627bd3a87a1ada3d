"""bfloat16 and float16: dropping equals masking as far as the type rounds, and no other type leaks in.

The oracle is an unpatched model of the same type. Its sums have other lengths, so numbers differ by rounding: the
tolerance is a few steps of the type at logits of about 2, and far below what hiding the tokens changes (about 1).
"""

from __future__ import annotations

import copy

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from support.builders import LLAMA, SIGLIP, answer, batch, clone, plain
from support.masking_check import assert_masking_up_to_rounding, distance

TOLERANCES = {torch.bfloat16: 0.06, torch.float16: 0.01}
TYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
SETUPS = {
    "prefill": {"prefill": PrefillPruner(keep=0.5)},
    "merging": {
        "vision": VisionStagePruner(window=3),
        "prefill": PrefillPruner(keep=1 / 3),
        "decode": DecodeCachePruner(),
    },
    "evicting": {
        "vision": VisionStagePruner(window=None, keep=12),
        "prefill": PrefillPruner(keep=0.25),
        "decode": DecodeCachePruner(keep=6, interval=2),
    },
}


def cast(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
@TYPES
def test_dropping_equals_masking_within_rounding(dtype, setup, attn):
    model = mustdrop.patch(clone(LLAMA, attn).to(dtype), **setup)
    oracle = copy.deepcopy(plain(LLAMA, attn)).to(dtype)
    inputs = cast(batch(LLAMA, (1, 2), seed=3), dtype)
    both = assert_masking_up_to_rounding(
        model,
        inputs,
        vision=setup.get("vision"),
        decode=setup.get("decode"),
        oracle_model=oracle,
        tolerance=TOLERANCES[dtype],
    )
    effect = distance(both.oracle.logits[:, 0], answer(oracle, inputs).logits[:, 0])
    assert effect > 5 * TOLERANCES[dtype], "hiding tokens changes no more than rounding does: this proves nothing"


@pytest.mark.parametrize("variant", [LLAMA, SIGLIP], ids=str)
@pytest.mark.parametrize("patch_first", [True, False], ids=["patched_first", "cast_first"])
@TYPES
def test_features_cache_hidden_states_and_logits_keep_the_models_type(dtype, patch_first, variant):
    if patch_first:
        model = mustdrop.patch(clone(variant), **SETUPS["merging"]).to(dtype)
    else:
        model = mustdrop.patch(clone(variant).to(dtype), **SETUPS["merging"])
    inputs = cast(batch(variant, (1, 2), seed=4), dtype)
    wrong = {}

    def watch(name):
        def hook(_, args, kwargs, out):
            for value in (*args, *kwargs.values(), *(out if isinstance(out, tuple) else (out,))):
                if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != dtype:
                    wrong.setdefault(name, value.dtype)

        return hook

    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if any(part in name for part in ("layers.", "projector", "lm_head", "norm"))
    ]
    with torch.no_grad():
        out = model(**inputs, use_cache=True, output_hidden_states=True)
        features = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        step = model(
            input_ids=torch.full((2, 1), 5),
            attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
            past_key_values=out.past_key_values,
        )
    for handle in handles:
        handle.remove()
    assert not wrong
    assert {out.logits.dtype, step.logits.dtype, *(h.dtype for h in out.hidden_states)} == {dtype}
    assert {f.dtype for f in features} == {dtype}
    assert {t.dtype for layer in out.past_key_values.layers for t in (layer.keys, layer.values)} == {dtype}
    assert mustdrop.trace(model).dropped_anything


@TYPES
def test_keeping_everything_is_bit_identical(dtype):
    inputs = cast(batch(LLAMA, (1, 2), seed=5), dtype)
    model = clone().to(dtype)
    expected = answer(model, inputs)
    got = answer(mustdrop.patch(model, keep=1.0), inputs)
    assert torch.equal(got.logits, expected.logits)


@TYPES
def test_autocast_gives_the_logits_of_the_masked_model_under_autocast(dtype):
    setup, inputs = SETUPS["prefill"], batch(LLAMA, (1, 2), seed=6)
    model = mustdrop.patch(clone(), **setup)
    with torch.autocast("cpu", dtype=dtype):
        assert_masking_up_to_rounding(
            model, inputs, decode=None, oracle_model=plain(LLAMA), tolerance=TOLERANCES[dtype]
        )
