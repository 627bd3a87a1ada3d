"""Prompts and calls at the edge: what real code does to a model that papers never mention."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.errors import MustDropError
from support.builders import (
    IMAGE,
    LLAMA,
    MISTRAL,
    QWEN2,
    answer,
    batch,
    clone,
    plain,
    row_alone,
)
from support.masking_check import TOLERANCE, assert_dropping_equals_masking, distance, merged_features, patched
from support.oracle import CacheWatch, Hidden, MaskedOracle, hidden_by

THRESHOLDS = {"prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02)}
EVERYTHING = {"prefill": PrefillPruner(global_threshold=1.0, individual_threshold=1.0)}
SELECTING = {"vision": VisionStagePruner(window=None, keep=5)}
ALL_THREE = {
    "vision": VisionStagePruner(window=3),
    "prefill": PrefillPruner(keep=1 / 3),
    "decode": DecodeCachePruner(),
}


@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=["alone", "padded"])
@pytest.mark.parametrize(
    "setup", [THRESHOLDS, EVERYTHING, SELECTING, ALL_THREE], ids=["thresholds", "everything", "selecting", "all_three"]
)
def test_a_prompt_that_ends_with_an_image(setup, images):
    """No text follows the image, so the last token scores. It also predicts the first word, so it never goes."""
    model, inputs = patched(**setup), batch(LLAMA, images, seed=1, after=(0,) * len(images))
    try:
        answer(model, inputs, steps=0)
    except MustDropError as error:
        assert "vision" in setup
        assert "image" in str(error)  # noqa: PT017
    else:
        both = assert_dropping_equals_masking(
            model, inputs, vision=setup.get("vision"), decode=setup.get("decode"), steps=4
        )
        for row, count in enumerate(images):
            assert both.trace.kept(LLAMA.n_layers, row)[-1] == count * LLAMA.n_vision - 1


@pytest.mark.parametrize("setup", [THRESHOLDS, SELECTING, ALL_THREE], ids=["thresholds", "selecting", "all_three"])
def test_padding_on_the_right_equals_the_row_alone(setup):
    inputs, model = batch(LLAMA, (1, 0, 2), seed=2), patched(**setup)
    lengths = inputs["attention_mask"].sum(1).tolist()
    right = dict(inputs)
    for name in ("input_ids", "attention_mask"):
        moved = [row.roll(n) for row, n in zip(inputs[name], lengths, strict=True)]
        right[name] = torch.stack(moved)
    assert (right["attention_mask"][:, 0] == 1).all()
    with torch.no_grad():
        together = model(**right).logits
        trace = mustdrop.trace(model)
        for row, length in enumerate(lengths):
            one = row_alone(inputs, row)
            alone = model(**one).logits[0]
            text = one["input_ids"][0] != IMAGE
            assert distance(together[row, :length][text], alone[text]) <= TOLERANCE
            assert torch.equal(trace.kept(LLAMA.n_layers, row), mustdrop.trace(model).kept(LLAMA.n_layers))


def test_the_attention_mask_may_be_missing_or_bool():
    model, inputs = patched(**ALL_THREE), row_alone(batch(LLAMA, seed=3), 0)
    expected = answer(model, inputs)
    without = {name: value for name, value in inputs.items() if name != "attention_mask"}
    for given in (without, {**inputs, "attention_mask": inputs["attention_mask"].bool()}):
        assert torch.equal(answer(model, given).logits, expected.logits)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("setup", [THRESHOLDS, ALL_THREE], ids=["thresholds", "all_three"])
def test_a_mask_of_the_callers_own_is_obeyed(setup, attn):
    """A 4-D mask that hides some text from the layers, as prefix-LM or packing code builds it."""
    model, inputs = patched(LLAMA, attn, **setup), row_alone(batch(LLAMA, seed=4), 0)
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None].clone()
    mask[..., -3:, 1] = False
    if attn == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    given = {**inputs, "attention_mask": mask}
    with torch.no_grad():
        ours = model(**given).logits[:, -1]
        hidden = hidden_by(mustdrop.trace(model), inputs["input_ids"], LLAMA.n_layers)
        features = merged_features(LLAMA, inputs, mustdrop.trace(model), setup.get("vision"))
        with MaskedOracle(plain(LLAMA, attn), hidden, features):
            theirs = plain(LLAMA, attn)(**given).logits[:, -1]
        assert distance(ours, theirs) <= TOLERANCE
        assert distance(ours, model(**inputs).logits[:, -1]) > 1e-3


def test_an_additive_mask_in_float64_hides_what_a_mask_of_rows_hides():
    """float64's lowest number does not fit into the float32 that torch makes of a plain number."""
    model, inputs = patched(LLAMA, **THRESHOLDS).double(), batch(LLAMA, (1, 2), seed=4)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    rows = inputs["attention_mask"].bool()
    seen = rows[:, None, None] & torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool).tril()
    additive = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(**inputs, position_ids=places).logits[:, -1]
        assert mustdrop.trace(model).dropped_anything
        ours = model(**{**inputs, "attention_mask": additive}, position_ids=places).logits[:, -1]
    assert distance(ours, expected) <= 1e-12


def test_an_image_token_among_the_generated_ones_is_text():
    """Without pixels in the call an image id is only a word; nothing is dropped for it."""
    model, inputs = patched(**ALL_THREE), row_alone(batch(LLAMA, seed=5), 0)
    words, given = (5, IMAGE, 7), {}
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        trace = mustdrop.trace(model)
        hidden = hidden_by(trace, inputs["input_ids"], LLAMA.n_layers, cascade_from=2)
        features = merged_features(LLAMA, inputs, trace, ALL_THREE["vision"])
        for name, each, first in (("ours", model, out), ("theirs", plain(), None)):
            with MaskedOracle(plain(), hidden, features):
                step = first or each(**inputs, use_cache=True)
                given[name] = []
                for word in words:
                    ids = torch.tensor([[word]])
                    step = each(input_ids=ids, past_key_values=step.past_key_values, use_cache=True)
                    given[name].append(step.logits)
    assert distance(torch.cat(given["ours"]), torch.cat(given["theirs"])) <= TOLERANCE


def test_a_budget_smaller_than_the_number_of_images():
    setup = {"vision": VisionStagePruner(window=None, keep=1)}
    both = assert_dropping_equals_masking(patched(**setup), batch(LLAMA, (2, 3), seed=6), **setup, steps=3)
    assert both.trace.tokens[0].tolist() == [1, 1]


@pytest.mark.parametrize(("tower", "text"), [("eager", "sdpa"), ("sdpa", "eager")])
def test_tower_and_text_model_with_different_attention_backends(tower, text):
    model = clone(LLAMA)
    model.set_attn_implementation({"vision_config": tower, "text_config": text})
    assert model.model.vision_tower.config._attn_implementation == tower
    assert model.model.language_model.config._attn_implementation == text
    mustdrop.patch(model, **ALL_THREE)
    assert_dropping_equals_masking(
        model, batch(LLAMA, (1, 2), seed=7), vision=ALL_THREE["vision"], decode=ALL_THREE["decode"], steps=3
    )


def test_transformers_own_error_about_missing_images_stays_and_the_model_stays_usable():
    model, inputs = patched(**ALL_THREE), batch(LLAMA, (2,), seed=8)
    expected = answer(model, inputs)
    with pytest.raises(ValueError, match="do not match"):
        answer(model, {**inputs, "pixel_values": inputs["pixel_values"][:1]})
    assert torch.equal(answer(model, inputs).logits, expected.logits)


def test_features_of_a_patched_model_placed_by_hand():
    """Dropped rows of the features are marks. Whoever places them must get masked numbers or an error, never NaN."""
    model, inputs = patched(vision=VisionStagePruner(window=None, keep=12)), batch(LLAMA, (1, 2), seed=9)
    at = inputs["input_ids"] == IMAGE
    with torch.no_grad():
        features = torch.cat(list(model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output))
        embeds = model.get_input_embeddings()(inputs["input_ids"]).clone()
        embeds[at] = features
        try:
            ours = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits[:, -1]
        except MustDropError:
            return
        hidden = torch.zeros_like(at)
        hidden[at] = features.isnan().any(-1)
        everywhere = hidden.expand(LLAMA.n_layers, -1, -1)
        with MaskedOracle(plain(), Hidden(everywhere, everywhere)):
            theirs = plain()(**inputs).logits[:, -1]
    assert hidden.any()
    assert distance(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_a_text_model_with_a_sliding_window(attn):
    """The window counts original positions, so a dropped token still takes its place in it."""
    config = copy.deepcopy(plain(MISTRAL).config)
    config.text_config.sliding_window = 24
    config._attn_implementation = attn
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.load_state_dict(plain(MISTRAL).state_dict())
    model.generation_config = copy.deepcopy(plain(MISTRAL).generation_config)
    inputs = batch(MISTRAL, (1, 2), seed=10)
    assert distance(answer(model, inputs).logits, answer(plain(MISTRAL), inputs).logits) > 1e-3
    shorter = mustdrop.patch(copy.deepcopy(model), prefill=PrefillPruner(keep=0.6), decode=DecodeCachePruner())
    ours = answer(shorter, inputs)
    hidden = hidden_by(mustdrop.trace(shorter), inputs["input_ids"], MISTRAL.n_layers, cascade_from=2)
    with MaskedOracle(model, hidden):  # a cache of full length: the oracle's masks need every slot
        theirs = answer(model, {**inputs, "past_key_values": DynamicCache()})
    assert hidden.anything
    assert distance(ours.logits, theirs.logits) <= TOLERANCE
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize(
    "setup",
    [
        THRESHOLDS,
        {"vision": VisionStagePruner(window=None, keep=0.4), "decode": DecodeCachePruner(keep=4, interval=2)},
    ],
    ids=["thresholds", "evicting"],
)
@pytest.mark.parametrize("variant", [LLAMA, QWEN2], ids=str)
def test_in_float64_nothing_but_rounding_is_left(setup, variant):
    """The bound of float32 is no fig leaf: in float64 the same comparison is ten orders of magnitude tighter."""
    model, oracle_model = patched(variant, **setup).double(), copy.deepcopy(plain(variant)).double()
    inputs = batch(variant, (1, 2), seed=11)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with CacheWatch(model) as watch:
        ours = answer(model, inputs)
    hidden = hidden_by(
        mustdrop.trace(model), inputs["input_ids"], variant.n_layers, cascade_from=2 if "decode" in setup else None
    )
    if "decode" in setup:
        with MaskedOracle(oracle_model, hidden) as oracle:
            answer(oracle_model, inputs, 0)
        hidden = watch.hidden_while_decoding(oracle.prompt_keys, inputs["input_ids"], hidden)
    with MaskedOracle(oracle_model, hidden):
        theirs = answer(oracle_model, inputs)
    assert hidden.anything
    assert distance(ours.logits.double(), theirs.logits.double()) <= 1e-6  # generate returns float32 logits
    with torch.no_grad(), MaskedOracle(oracle_model, Hidden(hidden.prefill, hidden.prefill)):
        theirs = oracle_model(**inputs).logits[:, -1]
    with torch.no_grad():
        assert distance(model(**inputs).logits[:, -1], theirs) <= 1e-12


# ------------------------------------------------------------------------------------------------ caches in other hands


def follow_up(inputs, sequences, cache):
    words = torch.randint(2, IMAGE, (len(sequences), 4), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([sequences, words], 1)
    more = torch.ones(len(ids), ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    mask = torch.cat([inputs["attention_mask"], more], 1)
    return {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}


@pytest.mark.parametrize("again", ["none", "thresholds"])
def test_a_model_patched_anew_continues_the_cache_of_another_method(again):
    model, inputs = patched(**THRESHOLDS), batch(LLAMA, (1, 2), seed=12)
    first = answer(model, inputs, steps=3)
    hidden = hidden_by(mustdrop.trace(model), inputs["input_ids"], LLAMA.n_layers)
    mustdrop.patch(model, "none") if again == "none" else mustdrop.patch(model, **SELECTING)
    second = answer(model, follow_up(inputs, first.sequences, first.cache), steps=3)
    with MaskedOracle(plain(), hidden):
        cache = answer(plain(), inputs, steps=3).cache
    with MaskedOracle(plain(), hidden):
        theirs = answer(plain(), follow_up(inputs, first.sequences, cache), steps=3)
    assert distance(second.logits, theirs.logits) <= TOLERANCE


def test_a_copied_cache_serves_two_questions():
    model, inputs = patched(**ALL_THREE), batch(LLAMA, (1, 2), seed=13)
    first = answer(model, inputs, steps=3)
    twin = copy.deepcopy(first.cache)
    answers = [answer(model, follow_up(inputs, first.sequences, cache), steps=4) for cache in (first.cache, twin)]
    assert torch.equal(answers[0].logits, answers[1].logits)


def test_the_second_turn_after_evictions_equals_masking():
    """What left the cache in turn one stays gone in turn two, and evictions go on."""
    setup = {"prefill": PrefillPruner(keep=0.6), "decode": DecodeCachePruner(keep=6, interval=2)}
    model, inputs = patched(**setup), batch(LLAMA, (1, 1), seed=14)
    with CacheWatch(model) as watch:
        first = answer(model, inputs, steps=6)
    base = hidden_by(mustdrop.trace(model), inputs["input_ids"], LLAMA.n_layers, cascade_from=2)
    with MaskedOracle(plain(), Hidden(base.prefill, base.prefill)) as oracle:
        answer(plain(), inputs, 0)
    hidden = watch.hidden_while_decoding(oracle.prompt_keys, inputs["input_ids"], base)
    with MaskedOracle(plain(), hidden):
        cache = answer(plain(), inputs, steps=6).cache
    following = follow_up(inputs, first.sequences, first.cache)
    with CacheWatch(model) as watch:
        second = answer(model, following, steps=5)
    seen = watch.hidden_while_decoding(oracle.prompt_keys, inputs["input_ids"], base)
    start = CacheWatch.hidden_at(watch.keys[0], oracle.prompt_keys, inputs["input_ids"], base)
    assert torch.equal(start, hidden.steps[6])
    later = Hidden(start, start, seen.steps)
    with MaskedOracle(plain(), later):
        theirs = answer(plain(), follow_up(inputs, first.sequences, cache), steps=5)
    assert distance(second.logits, theirs.logits) <= TOLERANCE
    assert torch.equal(second.sequences, theirs.sequences)


def test_patches_nest_and_the_outer_one_comes_back():
    model, inputs = clone(), batch(LLAMA, (1, 2), seed=15)
    untouched = answer(model, inputs)
    with mustdrop.patched(model, **THRESHOLDS):
        outer = answer(model, inputs)
        with mustdrop.patched(model, **ALL_THREE):
            assert not torch.equal(answer(model, inputs).logits, outer.logits)
        assert torch.equal(answer(model, inputs).logits, outer.logits)
    assert torch.equal(answer(model, inputs).logits, untouched.logits)


def test_the_base_model_alone_prunes_in_the_same_way():
    model, inputs = patched(**ALL_THREE), batch(LLAMA, (1, 2), seed=16)
    with torch.no_grad():
        states = model.model(**inputs).last_hidden_state
        trace = mustdrop.trace(model)
        assert torch.equal(model.lm_head(states), model(**inputs).logits)
    assert torch.equal(trace.tokens, mustdrop.trace(model).tokens)
