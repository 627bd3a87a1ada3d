"""Flex attention: its masks are functions, and what they say of the rows and slots that are left is what counts.

The masked reference runs sdpa. The kernel runs without a compiler: see tests/support/eager_flex.py. Families take turns
at four tests of the default run; `--breadth more` (`nox -s backends`) runs all four for each.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import registry
from mustdrop.errors import UnsupportedOptionError
from mustdrop.indices import PAD
from mustdrop.runtime import masks_flex
from mustdrop.runtime.masks import RowMap, physical_mask
from support import conversations, eager_flex, families
from support.builders import LLAMA, MISTRAL, QWEN2, SIGLIP, answer, batch, clone, row_alone
from support.masking_check import TOLERANCE, assert_dropping_equals_masking, compare, distance, patched
from support.versions import BEAMS_MIX_IMAGES

FLEX = eager_flex.NAME
pytestmark = pytest.mark.usefixtures("flex")

SELECT = {"vision": VisionStagePruner(window=None, keep=11)}
MERGE = {"vision": VisionStagePruner(window=2, threshold=0.9, layer=1)}
PREFILL = {"prefill": PrefillPruner(keep=0.6)}
THRESHOLDS = {"prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02)}
ALL = {
    "vision": VisionStagePruner(window=3),
    "prefill": PrefillPruner(keep=1 / 3),
    "decode": DecodeCachePruner(),
}
EVICTION = {
    "vision": VisionStagePruner(window=2, threshold=0.9, keep=24),
    "prefill": PrefillPruner(keep=0.4),
    "decode": DecodeCachePruner(keep=5, interval=2, full_layers=1),
}
SETUPS = {"select": SELECT, "merge": MERGE, "prefill": PREFILL, "thresholds": THRESHOLDS, "all": ALL, "evict": EVICTION}

#: Families whose text model transformers runs with flex attention.
KNOWN = [
    (name, kind)
    for name, adapter in families.AVAILABLE.items()
    if adapter.text(families.plain(name))._supports_flex_attn
    for kind in adapter.media
]
FAMILIES = [(name, kind) for name, kind in KNOWN if not registry()[name].lacks]
LACKING = [pair for pair in KNOWN if pair not in FAMILIES]
IN_TURN = (
    "test_a_family_keeps_all_bit_for_bit",
    "test_a_familys_row_is_what_it_is_alone",
    "test_a_familys_second_turn",
    "test_a_family_evicts_while_decoding",
)


def pytest_generate_tests(metafunc):
    test = metafunc.function.__name__
    if test in IN_TURN:
        few = metafunc.config.getoption("--breadth") == "turns"
        due = [pair for i, pair in enumerate(FAMILIES) if not few or i % len(IN_TURN) == IN_TURN.index(test)]
        metafunc.parametrize(("name", "kind"), due, ids=map("-".join, due))


def masked(variant, images, setup, **options):
    return assert_dropping_equals_masking(
        patched(variant, FLEX, **setup),
        batch(variant, images, seed=len(images)),
        variant,
        FLEX,
        vision=setup.get("vision"),
        decode=setup.get("decode"),
        **options,
    )


@pytest.mark.parametrize("images", [(1,), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("variant", [LLAMA, MISTRAL, QWEN2, SIGLIP], ids=str)
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_dropping_equals_masking_over_8_steps(setup, variant, images, flex):
    masked(variant, images, setup)
    assert flex["masked"] > 0


@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=str)
def test_keep_all_is_bit_identical(images):
    model = patched(
        LLAMA,
        FLEX,
        vision=VisionStagePruner(window=None, keep=1.0),
        prefill=PrefillPruner(keep=1.0),
        decode=DecodeCachePruner(),
    )
    with pytest.warns(mustdrop.errors.NothingDroppedWarning):
        ours = answer(model, batch(LLAMA, images))
    theirs = answer(eager_flex.use(clone(LLAMA)), batch(LLAMA, images))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("setup", [PREFILL, SELECT, ALL, EVICTION], ids=["prefill", "select", "all", "evict"])
def test_a_padded_row_equals_the_same_row_alone(setup):
    model, inputs = patched(LLAMA, FLEX, **setup), batch(LLAMA, (1, 0, 2), seed=6)
    together, trace = answer(model, inputs), mustdrop.trace(model)
    for row in range(3):
        alone, single = answer(model, row_alone(inputs, row)), mustdrop.trace(model)
        assert distance(together.logits[row], alone.logits[0]) <= TOLERANCE
        assert torch.equal(together.sequences[row, -9:], alone.sequences[0, -9:])
        assert all(torch.equal(trace.kept(i, row), single.kept(i)) for i in range(LLAMA.n_layers + 1))
        assert torch.equal(trace.kv_lengths[:, row], single.kv_lengths[:, 0])


def test_beams_samples_and_no_cache():
    both = masked(LLAMA, (1, 1) if BEAMS_MIX_IMAGES else (1, 2), ALL, steps=5, num_beams=3, num_return_sequences=2)
    assert both.ours.sequences.shape[0] == 4
    masked(LLAMA, (1, 2), {**PREFILL, "decode": DecodeCachePruner()}, steps=0, use_cache=False)
    setup = {**ALL}
    torch.manual_seed(0)
    ours = answer(patched(LLAMA, FLEX, **setup), batch(LLAMA, (1, 2)), do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    sdpa = answer(patched(LLAMA, "sdpa", **setup), batch(LLAMA, (1, 2)), do_sample=True, num_return_sequences=2)
    assert torch.equal(ours.sequences, sdpa.sequences)
    assert distance(ours.logits, sdpa.logits) <= TOLERANCE


def test_the_cache_holds_what_the_trace_counts_and_no_more():
    model, inputs = patched(LLAMA, FLEX, **ALL), batch(LLAMA, (1, 2))
    cache, trace = answer(model, inputs, 2).cache, mustdrop.trace(model)
    for layer, lengths in zip(cache.layers, trace.kv_lengths, strict=True):
        assert layer.keys.shape[2] == int(lengths.max())
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    assert trace.kv_bytes.actual < trace.kv_bytes.unpruned
    assert trace.backend == FLEX


def test_the_order_of_the_released_code():
    """There positions and causality follow the order in which the tokens stand; sdpa says what that means."""
    settings = {"compat": "released", "global_threshold": 0.02, "individual_threshold": 0.02}
    ours = answer(patched(LLAMA, FLEX, "mustdrop", **settings), batch(LLAMA, (1, 2)))
    sdpa = answer(patched(LLAMA, "sdpa", "mustdrop", **settings), batch(LLAMA, (1, 2)))
    assert torch.equal(ours.sequences, sdpa.sequences)
    assert distance(ours.logits, sdpa.logits) <= TOLERANCE


def test_encoder_and_language_model_may_differ():
    model = clone(LLAMA)
    model.set_attn_implementation({"text_config": FLEX, "vision_config": "eager"})
    inputs = batch(LLAMA, (1, 2))
    ours = answer(mustdrop.patch(model, **ALL), inputs)
    assert distance(ours.logits, answer(patched(LLAMA, FLEX, **ALL), inputs).logits) <= TOLERANCE
    model = mustdrop.patch(clone(LLAMA), **ALL)
    model.set_attn_implementation({"vision_config": FLEX})
    assert distance(ours.logits, answer(model, inputs).logits) <= TOLERANCE


# -- every family that runs -------------------------------------------------------------------------------------------


def test_a_family_keeps_all_bit_for_bit(name, kind):
    rows = ((kind,), (), (kind, kind))
    model = mustdrop.patch(
        families.clone(name, FLEX),
        vision=VisionStagePruner(window=None, keep=1.0),
        prefill=PrefillPruner(keep=1.0),
        decode=DecodeCachePruner(),
    )
    inputs = families.batch(registry()[name], model, rows)
    with pytest.warns(mustdrop.errors.NothingDroppedWarning):
        ours = answer(model, inputs)
    assert torch.equal(ours.logits, answer(families.clone(name, FLEX), inputs).logits)


def test_a_familys_row_is_what_it_is_alone(name, kind):
    pruners = {**families_setup(), "decode": DecodeCachePruner()}
    adapter, model, rows = (
        registry()[name],
        mustdrop.patch(families.clone(name, FLEX), **pruners),
        ((kind,), (kind,) * 2),
    )
    together = answer(model, families.batch(adapter, model, rows), 3)
    for r, row in enumerate(rows):
        alone = answer(model, families.batch(adapter, model, (row,), first=r), 3)
        assert distance(alone.logits[0], together.logits[r]) <= TOLERANCE


def test_a_familys_second_turn(name, kind):
    conversations.skip_where_backends_differ(name, kind, _flex_of(name))
    both = conversations.compare_two_turns(name, kind, FLEX, **families_setup(), decode=DecodeCachePruner())
    assert both.hidden.anything
    assert distance(both.ours.logits, both.oracle.logits) <= TOLERANCE
    assert torch.equal(both.ours.sequences, both.oracle.sequences)


def families_setup():
    return {"vision": VisionStagePruner(window=2, threshold=0.2), "prefill": PrefillPruner(keep=0.4)}


def _flex_of(name):
    return lambda: families.clone(name, FLEX)


def test_a_family_evicts_while_decoding(name, kind):
    families.assert_dropping_equals_masking(
        name,
        ((kind,), (), (kind, kind)),
        FLEX,
        vision=VisionStagePruner(window=None, keep=0.7),
        prefill=PrefillPruner(keep=0.5),
        decode=DecodeCachePruner(keep=4, interval=3, full_layers=1),
    )


@pytest.mark.parametrize(("name", "kind"), LACKING, ids=map("-".join, LACKING))
def test_the_stages_that_a_family_has(name, kind):
    setup = {"prefill": PrefillPruner(keep=0.6), "decode": DecodeCachePruner(keep=4, interval=3, full_layers=1)}
    left = families.fitting(name, setup)
    families.assert_dropping_equals_masking(name, ((kind,), (), (kind, kind)), FLEX, **left)


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reordered", [False, True])
def test_a_block_mask_says_what_the_mask_with_rows_and_columns_says(reordered):
    draw = torch.Generator().manual_seed(0)
    logical = torch.rand(2, 1, 6, 9, generator=draw) < 0.7
    rows = torch.tensor([[0, 2, 5], [PAD, 1, 4]])
    queries = (rows + 3).masked_fill(rows == PAD, PAD)
    slots = torch.cat([torch.tensor([[0, 2], [PAD, 1]]), queries], 1)
    layout = RowMap(rows, queries, slots, True, 9, reordered)
    blocks = create_block_mask(lambda b, h, q, kv: logical[b, 0, q, kv], 2, None, 6, 9, device="cpu")
    made = physical_mask(blocks, layout, FLEX, logical.float())
    assert torch.equal(masks_flex.whole(made), physical_mask(logical, layout, "sdpa", logical.float()))
    assert made.shape == (2, 1, 3, 5)


# -- refused ----------------------------------------------------------------------------------------------------------


def refused(model, inputs, match, **options):
    """Named before any layer runs."""
    ran = []
    tower, text = model.model.vision_tower, model.model.language_model
    handles = [part.register_forward_hook(lambda *_: ran.append(1)) for part in (tower, text)]
    with pytest.raises(UnsupportedOptionError, match=match):
        answer(model, inputs, 1, **options)
    assert not ran
    for handle in handles:
        handle.remove()
    answer(model, inputs | {"attention_mask": batch(LLAMA)["attention_mask"]}, 1)  # and nothing is left of it


def test_static_caches_are_refused():
    model = patched(LLAMA, FLEX, **PREFILL)
    refused(model, batch(LLAMA), "flex_attention.*sdpa", cache_implementation="static")
    given = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    refused(model, batch(LLAMA), "flex_attention.*sdpa", past_key_values=given)


def test_masks_of_somebodys_own_are_refused():
    model, inputs = patched(LLAMA, FLEX, **PREFILL), batch(LLAMA)
    n = inputs["input_ids"].shape[1]
    blocks = create_block_mask(lambda b, h, q, kv: q >= kv, 1, None, n, n, device="cpu")
    for mask in (blocks, torch.ones(1, 1, n, n, dtype=torch.bool).tril()):
        with pytest.raises(UnsupportedOptionError, match=r"flex_attention.*mask of \(rows, tokens\)"):
            model(**inputs | {"attention_mask": mask})


def test_other_kinds_of_flex_attention_are_refused():
    model = patched(LLAMA, **PREFILL)
    model.model.language_model.config._attn_implementation_internal = "my_flex_attention"
    with pytest.raises(UnsupportedOptionError, match=r"'my_flex_attention'.*sdpa"):
        answer(model, batch(LLAMA), 1)


def test_weighing_merged_tokens_is_refused_in_the_encoder():
    model = mustdrop.patch(eager_flex.use(families.clone("llava")), "tome", keep=0.5)
    inputs = families.batch(registry()["llava"], model, (("image",),))
    with pytest.raises(UnsupportedOptionError, match=r"'flex_attention' takes no bias.*proportional=False"):
        answer(model, inputs, 1)


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_merging_in_the_encoder_without_weights_is_that_of_sdpa(name):
    """A mask that hides nothing does not send the merging behind the encoder."""
    answers = []
    for attention in (FLEX, "sdpa"):
        model = mustdrop.patch(families.clone(name, attention), "tome", keep=0.5, proportional=False)
        inputs = families.batch(registry()[name], model, (("image",), ("image", "image")))
        answers.append(answer(model, inputs, 3, past_key_values=DynamicCache()).logits)
        assert mustdrop.trace(model).dropped_anything
    assert distance(*answers) <= TOLERANCE


def test_compare_has_power():
    """The tests above would notice a difference: other settings give other numbers."""
    ours = compare(patched(LLAMA, FLEX, **PREFILL), batch(LLAMA), LLAMA, FLEX).ours
    assert distance(ours.logits, answer(eager_flex.use(clone(LLAMA)), batch(LLAMA)).logits) > 1e-3


def test_the_kernel_of_these_tests_is_that_of_torch():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, generator=draw) for heads, n in ((4, 5), (2, 9), (2, 9)))
    known = torch.rand(2, 9, generator=draw) < 0.7
    mask = create_block_mask(lambda b, h, i, j: known[b, j] & (j <= i + 4), 2, None, 5, 9, device="cpu")
    options = {"score_mod": lambda s, b, h, i, j: 3 * torch.tanh(s / 3), "block_mask": mask, "scale": 0.3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager_flex.kernel, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        expected = eager_flex.kernel.flex_attention(q, k, v, enable_gqa=True, **options)
    assert distance(eager_flex.attend(q, k, v, **options), expected) <= 1e-6
