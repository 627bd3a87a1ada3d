"""Dropping tokens equals hiding them: at the prefill and over 8 decode steps, within 1e-5 in float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from support.builders import LLAMA, MISTRAL, QWEN2, SIGLIP, answer, batch, plain, row_alone, vision_positions
from support.masking_check import TOLERANCE, assert_dropping_equals_masking, distance, merged_features, patched
from support.oracle import MaskedOracle, hidden_by

FLASH = "flash_attention_2"
THRESHOLDS = {"global_threshold": 0.02, "individual_threshold": 0.02}

#: Compositions of the three pruners, each optional.
SETUPS = {
    "prefill keep": {"prefill": PrefillPruner(keep=0.6)},
    "prefill keep at given layers": {"prefill": PrefillPruner(keep=0.6, layers=(0, 2))},
    "prefill thresholds": {"prefill": PrefillPruner(**THRESHOLDS)},
    "prefill drops everything": {"prefill": PrefillPruner(global_threshold=1.0, individual_threshold=1.0)},
    "prefill weighted budget": {"prefill": PrefillPruner(keep=0.5, **THRESHOLDS)},
    "prefill rank": {"prefill": PrefillPruner(scale=1.5, bias=6.0)},
    "vision select": {"vision": VisionStagePruner(window=None, keep=11)},
    "vision random": {"vision": VisionStagePruner(window=None, keep=0.3, score="random", seed=3)},
    "vision merge": {"vision": VisionStagePruner(window=3)},
    "vision merge 2x2 late": {"vision": VisionStagePruner(window=2, threshold=0.9, layer=1)},
    "vision merge and select": {"vision": VisionStagePruner(window=2, threshold=0.85, keep=14)},
    "vision and prefill": {
        "vision": VisionStagePruner(window=None, keep=20, key_share=0.2),
        "prefill": PrefillPruner(**THRESHOLDS),
    },
    "prefill and cascade": {"prefill": PrefillPruner(keep=0.6), "decode": DecodeCachePruner()},
    "cascade over all layers": {"prefill": PrefillPruner(**THRESHOLDS), "decode": DecodeCachePruner(full_layers=0)},
    "all three with merging": {
        "vision": VisionStagePruner(window=3),
        "prefill": PrefillPruner(keep=1 / 3),
        "decode": DecodeCachePruner(),
    },
    "eviction": {"decode": DecodeCachePruner(keep=9, interval=3)},
    "eviction every step": {"prefill": PrefillPruner(keep=0.6), "decode": DecodeCachePruner(keep=4, interval=1)},
    "all three with eviction": {
        "vision": VisionStagePruner(window=2, threshold=0.9, keep=24),
        "prefill": PrefillPruner(keep=0.4),
        "decode": DecodeCachePruner(keep=5, interval=2, full_layers=1),
    },
}

#: (setup, variant, attention, images per row): every setup, and every pair of backend, model and batch.
CASES = [
    ("prefill keep", LLAMA, "sdpa", (1,)),
    ("prefill keep", MISTRAL, "eager", (1, 2)),
    ("prefill keep", QWEN2, FLASH, (2, 1)),
    ("prefill keep", SIGLIP, "sdpa", (1, 0, 2)),
    ("prefill keep at given layers", LLAMA, "eager", (2,)),
    ("prefill keep at given layers", MISTRAL, FLASH, (1, 0)),
    ("prefill thresholds", LLAMA, "sdpa", (1, 2)),
    ("prefill thresholds", QWEN2, "eager", (2,)),
    ("prefill thresholds", SIGLIP, FLASH, (1,)),
    ("prefill drops everything", LLAMA, "sdpa", (1, 0)),
    ("prefill drops everything", MISTRAL, FLASH, (1,)),
    ("prefill weighted budget", QWEN2, "sdpa", (1, 1)),
    ("prefill rank", LLAMA, FLASH, (1, 2)),
    ("prefill rank", SIGLIP, "eager", (1,)),
    ("vision select", LLAMA, "sdpa", (1, 2)),
    ("vision select", QWEN2, "eager", (1,)),
    ("vision select", SIGLIP, FLASH, (2, 0)),
    ("vision select", MISTRAL, FLASH, (1,)),
    ("vision random", LLAMA, "eager", (1, 0, 1)),
    ("vision merge", LLAMA, "sdpa", (1, 2)),
    ("vision merge", MISTRAL, "eager", (2,)),
    ("vision merge 2x2 late", SIGLIP, "sdpa", (1, 2)),
    ("vision merge 2x2 late", QWEN2, FLASH, (1,)),
    ("vision merge and select", QWEN2, "sdpa", (2, 1)),
    ("vision merge and select", SIGLIP, "eager", (1,)),
    ("vision and prefill", LLAMA, FLASH, (2, 1)),
    ("vision and prefill", SIGLIP, "sdpa", (1,)),
    ("prefill and cascade", LLAMA, "eager", (1, 2)),
    ("prefill and cascade", QWEN2, "sdpa", (1,)),
    ("cascade over all layers", MISTRAL, "sdpa", (1, 0, 2)),
    ("cascade over all layers", SIGLIP, FLASH, (1, 1)),
    ("all three with merging", LLAMA, "sdpa", (1, 2)),
    ("all three with merging", MISTRAL, "eager", (1,)),
    ("all three with merging", LLAMA, FLASH, (1, 0)),
    ("eviction", LLAMA, "sdpa", (1,)),
    ("eviction", QWEN2, "eager", (1, 2)),
    ("eviction every step", LLAMA, FLASH, (1,)),
    ("eviction every step", MISTRAL, "sdpa", (2, 0)),
    ("all three with eviction", SIGLIP, "sdpa", (1, 2)),
    ("all three with eviction", LLAMA, FLASH, (1, 1)),
]


@pytest.mark.parametrize(
    ("setup", "variant", "attn", "images"), CASES, ids=lambda value: str(value).replace(" ", "_").replace(",", "")
)
def test_dropping_equals_masking_over_8_steps(setup, variant, attn, images, request):
    if attn == FLASH:
        request.getfixturevalue("flash")
    pruners = SETUPS[setup]
    both = assert_dropping_equals_masking(
        patched(variant, attn, **pruners),
        batch(variant, images, seed=len(images)),
        variant,
        attn,
        vision=pruners.get("vision"),
        decode=pruners.get("decode"),
    )
    untouched = answer(plain(variant), batch(variant, images, seed=len(images)))
    assert distance(both.ours.logits, untouched.logits) > 1e-3  # the comparison has power


@pytest.mark.parametrize("variant", [LLAMA, SIGLIP], ids=str)
def test_the_default_patch_equals_masking(variant):
    """``mustdrop.patch(model)`` and nothing else: all three stages at a budget of one third."""
    from support.builders import clone

    both = assert_dropping_equals_masking(
        mustdrop.patch(clone(variant)),
        batch(variant, (1, 2)),
        variant,
        vision=VisionStagePruner(merge_count="budget", merge_share=0.5),
        decode=DecodeCachePruner(),
    )
    for row, total in enumerate((variant.n_vision, 2 * variant.n_vision)):
        assert total / 3 - 1 < both.trace.equal_tokens[row] <= total / 3 + 1e-4


@pytest.mark.parametrize(
    ("setup", "variant", "attn"),
    [
        ("prefill keep", LLAMA, "sdpa"),
        ("prefill thresholds", MISTRAL, "eager"),
        ("prefill rank", QWEN2, FLASH),
        ("vision select", SIGLIP, "sdpa"),
        ("all three with merging", LLAMA, FLASH),
        ("all three with merging", MISTRAL, "sdpa"),
    ],
)
def test_a_plain_forward_equals_masking_at_every_position_that_is_left(setup, variant, attn, request):
    if attn == FLASH:
        request.getfixturevalue("flash")
    pruners, inputs = SETUPS[setup], batch(variant, (1, 0, 2), seed=4)
    model = patched(variant, attn, **pruners)
    oracle_model = plain(variant, "sdpa" if attn == FLASH else attn)
    with torch.no_grad():
        ours = model(**inputs).logits
        trace = mustdrop.trace(model)
        hidden = hidden_by(trace, inputs["input_ids"], variant.n_layers)
        features = merged_features(variant, inputs, trace, pruners.get("vision"))
        with MaskedOracle(oracle_model, hidden, features):
            theirs = oracle_model(**inputs).logits
    assert ours.shape == theirs.shape == (*inputs["input_ids"].shape, ours.shape[-1])
    left = inputs["attention_mask"].bool()
    for row in range(3):
        where = vision_positions(inputs["input_ids"], row)
        left[row, where] = False
        left[row, where[trace.kept(variant.n_layers, row)]] = True
    assert distance(ours[left], theirs[left]) <= TOLERANCE


@pytest.mark.parametrize(("variant", "attn"), [(LLAMA, "eager"), (QWEN2, "sdpa"), (SIGLIP, FLASH)], ids=str)
@pytest.mark.parametrize("setup", ["prefill thresholds", "prefill keep", "prefill weighted budget"])
def test_what_goes_is_what_the_text_does_not_look_at(setup, variant, attn, request):
    """Every decision follows from the attentions that the masked plain model itself reports."""
    if attn == FLASH:
        request.getfixturevalue("flash")
    pruner, inputs = SETUPS[setup]["prefill"], batch(variant, (1, 0, 2), seed=9)
    model, oracle_model = patched(variant, attn, prefill=pruner), plain(variant, "eager")
    with torch.no_grad():
        model(**inputs)
        trace = mustdrop.trace(model)
        with MaskedOracle(oracle_model, hidden_by(trace, inputs["input_ids"], variant.n_layers)):
            attentions = oracle_model(**inputs, output_attentions=True).attentions
    gamma, alpha = pruner.global_threshold or 1.0, pruner.individual_threshold or 1.0
    gone = 0
    for row in (0, 2):
        where = vision_positions(inputs["input_ids"], row)
        for layer in pruner.filter_layers(variant.n_layers):
            alive, after = trace.kept(layer, row), trace.kept(layer + 1, row)
            text_to_vision = attentions[layer][row].double().mean(0)[where[-1] + 1 :, where[alive]]
            share, peak = text_to_vision.sum(0) / text_to_vision.sum(), text_to_vision.amax(0)
            if pruner.keep is None:
                expected = alive[~((share < gamma) & (peak < alpha))]
            else:
                expected = alive[torch.maximum(share / gamma, peak / alpha).topk(len(after)).indices].sort().values
            assert torch.equal(after, expected), (row, layer)
            gone += len(alive) - len(after)
    assert gone > 20


@pytest.mark.parametrize("attn", ["eager", "sdpa", FLASH])
@pytest.mark.parametrize(
    "setup", ["prefill keep", "vision select", "all three with merging", "all three with eviction"]
)
def test_a_padded_row_equals_the_same_row_alone(setup, attn, request):
    if attn == FLASH:
        request.getfixturevalue("flash")
    model = patched(LLAMA, attn, **SETUPS[setup])
    inputs = batch(LLAMA, (1, 0, 2), seed=6)
    together, trace = answer(model, inputs), mustdrop.trace(model)
    for row in range(3):
        alone = answer(model, row_alone(inputs, row))
        assert distance(together.logits[row], alone.logits[0]) <= TOLERANCE
        assert torch.equal(together.sequences[row, -9:], alone.sequences[0, -9:])
        single = mustdrop.trace(model)
        for layer in range(LLAMA.n_layers + 1):
            assert torch.equal(trace.kept(layer, row), single.kept(layer))
        assert torch.equal(trace.kv_lengths[:, row], single.kv_lengths[:, 0])
        assert torch.equal(trace.assignment(row), single.assignment())


@pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")  # thresholds may keep all
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_dropping_equals_masking_for_any_batch_and_any_pruner(data):
    variant = data.draw(st.sampled_from([LLAMA, MISTRAL, SIGLIP]), "variant")
    images = tuple(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(any), "images"))
    lengths = st.lists(st.integers(1, 7), min_size=len(images), max_size=len(images))
    inputs = batch(
        variant,
        images,
        data.draw(st.integers(0, 99), "seed"),
        data.draw(lengths, "before"),
        data.draw(lengths, "after"),
    )
    setup = {}
    if data.draw(st.booleans(), "with a vision stage"):
        setup["vision"] = VisionStagePruner(
            window=data.draw(st.sampled_from([None, 2, 3]), "window"),
            threshold=data.draw(st.sampled_from([0.7, 0.9]), "threshold"),
            keep=data.draw(st.sampled_from(["auto", 0.3, 0.6, 10]), "vision keep"),
            key_share=data.draw(st.sampled_from([0.0, 0.1, 0.5]), "key share"),
        )
    if not setup or data.draw(st.booleans(), "with a prefill stage"):
        setup["prefill"] = data.draw(
            st.sampled_from([PrefillPruner(keep=0.7), PrefillPruner(**THRESHOLDS), PrefillPruner(scale=1.0, bias=2.0)]),
            "prefill",
        )
    if data.draw(st.booleans(), "with a decode stage"):
        setup["decode"] = DecodeCachePruner(
            keep=data.draw(st.sampled_from([None, 3, 0.2]), "decode keep"),
            interval=data.draw(st.integers(1, 3), "interval"),
            full_layers=data.draw(st.integers(0, 3), "full layers"),
        )
    if setup.get("prefill") == PrefillPruner(keep=0.7) and setup.get("vision") and setup["vision"].keep != "auto":
        del setup["prefill"]  # the two budgets of one prompt may contradict each other
    both = (
        assert_dropping_equals_masking(
            patched(variant, **setup),
            inputs,
            variant,
            vision=setup.get("vision"),
            decode=setup.get("decode"),
            steps=4,
        )
        if _drops(variant, setup, inputs)
        else None
    )
    assert both is None or both.trace.total.tolist() == [n * variant.n_vision for n in images]


def _drops(variant, setup, inputs):
    """Whether this set-up drops anything of these inputs (thresholds and windows may not)."""
    model = patched(variant, **setup)
    answer(model, inputs, steps=3)
    trace = mustdrop.trace(model)
    evicts = setup.get("decode") is not None and setup["decode"].keep is not None
    return evicts or bool((trace.tokens < trace.total[None]).any() or (trace.equal_tokens < trace.total).any())
