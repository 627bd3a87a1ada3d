"""A static cache of a patched model: the numbers of the masked oracle, in less room."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.errors import CacheStateError, UnsupportedOptionError
from mustdrop.kv import PrunedStaticLayer
from support import fake_flash
from support.builders import LLAMA, MISTRAL, QWEN2, SIGLIP, answer, batch, clone, plain, row_alone
from support.masking_check import TOLERANCE, assert_dropping_equals_masking, distance, patched
from support.versions import BEAMS_MIX_IMAGES

STATIC = {"cache_implementation": "static"}
THRESHOLDS = {"prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02)}
CASCADE = {"prefill": PrefillPruner(keep=0.4), "decode": DecodeCachePruner()}
FROM_0 = {"prefill": PrefillPruner(keep=0.4), "decode": DecodeCachePruner(full_layers=0)}
SELECTING = {"vision": VisionStagePruner(window=None, keep=11), "prefill": PrefillPruner(scale=1.0, bias=2.0)}
ALL_THREE = {
    "vision": VisionStagePruner(window=3),
    "prefill": PrefillPruner(keep=1 / 3),
    "decode": DecodeCachePruner(),
}
RELEASED = {
    "vision": VisionStagePruner(compat="released"),
    "prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02, compat="released"),
    "decode": DecodeCachePruner(),
}
SETUPS = {
    "thresholds": THRESHOLDS,
    "cascade": CASCADE,
    "from_0": FROM_0,
    "selecting": SELECTING,
    "all_three": ALL_THREE,
}
ROWS = (1, 1) if BEAMS_MIX_IMAGES else (1, 2)


def static(model, length=160, **options):
    return StaticCache(config=model.config.get_text_config(), max_cache_len=length, **options)


def growing(model):
    return DynamicCache(config=model.config.get_text_config())


def room(cache):
    return [layer.keys.shape[2] for layer in cache.layers]


def stored_bytes(cache):
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


def pruners(setup):
    return {name: setup[name] for name in ("vision", "decode") if name in setup}


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [(1,), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("setup", SETUPS)
def test_dropping_equals_masking(setup, images, attn):
    setup, inputs = SETUPS[setup], batch(LLAMA, images, seed=3)
    both = assert_dropping_equals_masking(
        patched(LLAMA, attn, **setup), inputs, LLAMA, attn, **pruners(setup), **STATIC
    )
    assert isinstance(both.ours.cache, StaticCache)
    model = patched(LLAMA, attn, **setup)
    given = {"past_key_values": static(model)}
    both = assert_dropping_equals_masking(model, inputs, LLAMA, attn, **pruners(setup), **given)
    assert both.ours.cache is given["past_key_values"]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", [MISTRAL, QWEN2, SIGLIP], ids=str)
def test_other_models(variant, attn):
    inputs = batch(variant, (1, 2), seed=4)
    model = patched(variant, attn, **ALL_THREE)
    assert_dropping_equals_masking(model, inputs, variant, attn, **pruners(ALL_THREE), **STATIC)


@pytest.mark.parametrize("setup", [CASCADE, ALL_THREE], ids=["cascade", "all_three"])
def test_beam_search(setup):
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, ROWS, seed=8)
    both = assert_dropping_equals_masking(model, inputs, **pruners(setup), num_beams=3, **STATIC)
    assert both.trace.tokens.shape == (LLAMA.n_layers, 6)


def test_several_samples_per_prompt():
    model, inputs = patched(LLAMA, **ALL_THREE), batch(LLAMA, ROWS, seed=9)
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 0}
    torch.manual_seed(0)
    expected = answer(model, inputs, **options)
    torch.manual_seed(0)
    got = answer(model, inputs, **options, **STATIC)
    assert torch.equal(got.sequences, expected.sequences)
    assert distance(got.logits, expected.logits) <= TOLERANCE


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=str)
def test_renumbered_positions(images, attn):
    model, inputs = patched(LLAMA, attn, **RELEASED), batch(LLAMA, images, seed=5)
    expected, got = answer(model, inputs), answer(model, inputs, **STATIC)
    assert mustdrop.trace(model).dropped_anything
    assert distance(got.logits, expected.logits) <= TOLERANCE


@pytest.mark.parametrize("setup", SETUPS)
def test_a_padded_row_equals_the_same_row_alone(setup):
    model, inputs = patched(LLAMA, **SETUPS[setup]), batch(LLAMA, (1, 0, 2), seed=6)
    together = answer(model, inputs, **STATIC)
    for row in range(3):
        alone = answer(model, row_alone(inputs, row), **STATIC)
        assert distance(together.logits[row], alone.logits[0]) <= TOLERANCE


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("images", [(1,), (1, 2), (0, 0)], ids=str)
def test_keeping_everything_changes_no_bit(images, attn):
    inputs = batch(LLAMA, images, seed=7)
    keep_all = {"prefill": PrefillPruner(keep=1.0), "decode": DecodeCachePruner()}
    model = patched(LLAMA, attn, **keep_all if any(images) else CASCADE)
    got, expected = answer(model, inputs, **STATIC), answer(clone(LLAMA, attn), inputs, **STATIC)
    assert torch.equal(got.logits, expected.logits)
    assert room(got.cache) == room(expected.cache)


# --------------------------------------------------------------------------------------------------------------- room


@pytest.mark.parametrize("images", [(1,), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("setup", SETUPS)
def test_a_layer_has_room_for_what_it_keeps_and_the_tokens_to_come(setup, images):
    model, inputs = patched(LLAMA, **SETUPS[setup]), batch(LLAMA, images, seed=1)
    steps, length = 6, inputs["input_ids"].shape[1]
    expected = answer(model, inputs, steps)
    longest = mustdrop.trace(model).kv_lengths.amax(1)
    whole = answer(plain(LLAMA), inputs, steps, past_key_values=static(model)).cache
    for cache in (static(model), None):
        given = STATIC if cache is None else {"past_key_values": cache}
        cache = answer(model, inputs, steps, **given).cache
        trace, most = mustdrop.trace(model), cache.layers[0].max_cache_len
        assert torch.equal(trace.kv_lengths.amax(1), longest)
        assert room(cache) == [most - (length + steps - layer.keys.shape[2]) for layer in expected.cache.layers]
        assert trace.kv_bytes.actual == stored_bytes(cache)
        assert trace.kv_bytes.unpruned == stored_bytes(whole) * most // 160
        assert cache.get_seq_length() == length + steps
    assert min(room(cache)) < most


def test_the_last_slot_is_used_and_one_more_token_is_transformers_own_error():
    model, inputs = patched(LLAMA, **CASCADE), batch(LLAMA, (1,), seed=2)
    length = inputs["input_ids"].shape[1]
    for steps, most in ((3, length + 3), (3, length + 2), (3, length - 1)):
        caches = [static(model, most) for _ in range(2)]
        if most == length + steps:
            answer(model, inputs, steps, past_key_values=caches[0])
            continue
        with pytest.raises((IndexError, RuntimeError)) as theirs:
            answer(plain(LLAMA), inputs, steps, past_key_values=caches[0])
        with pytest.raises(theirs.type):
            answer(model, inputs, steps, past_key_values=caches[1])


# -------------------------------------------------------------------------------------------------------------- reuse


@pytest.mark.parametrize("setup", [CASCADE, ALL_THREE], ids=["cascade", "all_three"])
@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=str)
@pytest.mark.parametrize("new", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("began", ["patched", "unpatched"])
def test_a_chat_continues(setup, images, new, began):
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, images, seed=17)
    more = batch(LLAMA, tuple(int(new) for _ in images), seed=18)
    found = []
    for cache in (growing(model), static(model)):
        first = answer(model if began == "patched" else plain(LLAMA), inputs, 3, past_key_values=cache)
        ids = torch.cat([first.sequences, more["input_ids"]], 1)
        known = first.sequences.shape[1] - inputs["attention_mask"].shape[1]
        masks = [inputs["attention_mask"], torch.ones(len(ids), known, dtype=torch.long), more["attention_mask"]]
        following = {**more, "input_ids": ids, "attention_mask": torch.cat(masks, 1)}
        found.append((first.logits, answer(model, following, 5, past_key_values=cache).logits))
    assert distance(found[0][0], found[1][0]) <= TOLERANCE
    assert distance(found[0][1], found[1][1]) <= TOLERANCE


@pytest.mark.parametrize("cache", [growing, static], ids=["growing", "static"])
def test_a_row_that_lost_tokens_beside_one_that_lost_none(cache):
    """The cache is then as long as the sequence, and still its slots are not positions, in the next turn either."""
    first = batch(LLAMA, (2, 0), seed=5, before=(2, 76), after=(5, 5))
    second = batch(LLAMA, (1, 0), seed=6, before=(2, 39), after=(3, 2))
    assert first["attention_mask"].all()
    assert second["attention_mask"].all()
    seen = first["input_ids"].shape[1]

    def talk(rows):
        model, kept = patched(LLAMA, prefill=PrefillPruner(keep=36, layers=(1, 3))), []
        past = cache(model)
        for inputs, length in ((first, seen), (second, seen + second["input_ids"].shape[1])):
            ids = inputs["input_ids"][:rows]
            mask = torch.ones(rows, length, dtype=torch.long)
            model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], past_key_values=past)
            kept.append(mustdrop.trace(model).tokens[:, 0])
        assert (kept[0] < 72).any()
        assert (kept[1] == 36).all()
        mask = torch.ones(rows, length + 1, dtype=torch.long)
        return model(input_ids=torch.full((rows, 1), 7), attention_mask=mask, past_key_values=past).logits

    with torch.no_grad(), pytest.warns(mustdrop.errors.NothingDroppedWarning):
        assert distance(talk(2)[:1], talk(1)) <= TOLERANCE


def test_a_cache_that_was_reset_is_as_good_as_new():
    model = patched(LLAMA, **CASCADE)
    cache = static(model)
    for seed, images in ((1, (1,)), (2, (1,)), (3, (2,))):
        inputs = batch(LLAMA, images, seed=seed)
        fresh = answer(model, inputs, past_key_values=static(model))
        again = answer(model, inputs, past_key_values=cache)
        assert torch.equal(again.logits, fresh.logits)
        assert room(cache) == room(fresh.cache)
        cache.reset()
        assert cache.get_seq_length() == 0
    inputs, model = batch(LLAMA, (1,), seed=4), mustdrop.unpatch(model)
    expected = answer(plain(LLAMA), inputs, past_key_values=static(model))
    assert torch.equal(answer(model, inputs, past_key_values=cache).logits, expected.logits)
    assert room(cache) == room(expected.cache)


def test_generate_again_and_after_unpatching():
    """Up to 5.13 the model keeps one cache and resets it for every call; later ones remember how long the longest was.

    So the model that is compared with is asked the same, and nothing else before.
    """
    model, untouched = clone(), clone()
    for seed in (1, 2):
        inputs = batch(LLAMA, (1, 2), seed=seed)
        with mustdrop.patched(model, **ALL_THREE):
            expected = answer(model, inputs)
            assert distance(answer(model, inputs, **STATIC).logits, expected.logits) <= TOLERANCE
        assert torch.equal(answer(model, inputs, **STATIC).logits, answer(untouched, inputs, **STATIC).logits)


def test_a_copied_cache_goes_its_own_way():
    model, inputs = patched(LLAMA, **CASCADE), batch(LLAMA, (1,), seed=1)
    cache = static(model)
    first = answer(model, inputs, 2, past_key_values=cache)
    inputs = {"input_ids": first.sequences}
    twin = copy.deepcopy(cache)
    expected = answer(model, inputs, past_key_values=cache)
    assert torch.equal(answer(model, inputs, past_key_values=twin).logits, expected.logits)


def test_a_cache_that_was_allocated_before():
    model, inputs = patched(LLAMA, **ALL_THREE), batch(LLAMA, (1,), seed=1)
    cache, text = static(model), model.config.text_config
    heads, size = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    cache.early_initialization(1, heads, size, torch.float32, torch.device("cpu"))
    expected = answer(model, inputs, past_key_values=static(model))
    assert torch.equal(answer(model, inputs, past_key_values=cache).logits, expected.logits)
    assert room(cache) == room(expected.cache)


# ------------------------------------------------------------------------------------------------------------ refused


def test_a_pruned_cache_is_refused_by_a_model_that_is_not_patched():
    inputs, model = batch(LLAMA, seed=6), patched(LLAMA, **CASCADE)
    cache = answer(model, inputs, steps=2, **STATIC).cache
    assert all(type(layer) is PrunedStaticLayer for layer in cache.layers)
    mustdrop.unpatch(model)
    with pytest.raises(CacheStateError, match="patch"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def refused(model, inputs, match, **options):
    work = []
    modules = [model.model.vision_tower, *model.model.language_model.layers]
    handles = [module.register_forward_hook(lambda *_: work.append(1)) for module in modules]
    with pytest.raises(UnsupportedOptionError, match=match):
        answer(model, inputs, 2, **options)
    if "past_key_values" in options:
        with pytest.raises(UnsupportedOptionError, match=match):
            model(**inputs, **options)
    for handle in handles:
        handle.remove()
    assert not work, "work was done before the error"


def test_evictions_are_refused_by_name_before_any_work():
    model, inputs = patched(LLAMA, decode=DecodeCachePruner(keep=5)), batch()
    refused(model, inputs, "decode_keep", **STATIC)
    refused(model, inputs, "decode_keep", past_key_values=static(model))


@pytest.mark.usefixtures("flash")
def test_flash_attention_is_refused_by_name_before_any_work():
    model, inputs = patched(LLAMA, fake_flash.NAME, **CASCADE), batch()
    refused(model, inputs, "flash_attention_2.*sdpa", **STATIC)
    refused(model, inputs, "flash_attention_2.*sdpa", past_key_values=static(model))


def test_sliding_windows_of_fixed_size_are_refused_by_name_before_any_work():
    model, inputs = clone(MISTRAL), batch(MISTRAL)
    model.config.text_config.sliding_window = 32
    mustdrop.patch(model, prefill=PrefillPruner(keep=0.6), decode=DecodeCachePruner())
    refused(model, inputs, "StaticSlidingWindowLayer", **STATIC)
    refused(model, inputs, "StaticSlidingWindowLayer", past_key_values=static(model))


def test_a_cache_of_an_encoder_and_a_decoder_is_refused_by_name_before_any_work():
    model = patched(LLAMA, **CASCADE)
    cache = transformers.EncoderDecoderCache(static(model), static(model))
    refused(model, batch(), "EncoderDecoderCache", past_key_values=cache)


# -------------------------------------------------------------------------------------------------- what the host knows


@pytest.mark.parametrize("setup", SETUPS)
def test_the_host_counts_in_a_pass_only(setup):
    """Between passes a compiled or captured step moves the counter, and no code of ours is run."""
    model, cache = patched(LLAMA, **SETUPS[setup]), None
    cache = static(model)
    known = []
    handle = model.model.language_model.layers[-1].register_forward_hook(
        lambda *_: known.append([(layer.filled, layer.dropped, int(layer.get_seq_length())) for layer in cache.layers])
    )
    answer(model, batch(LLAMA, (1, 2), seed=3), 1, past_key_values=cache)
    handle.remove()
    assert all(filled + dropped == counted for filled, dropped, counted in known[0])
    assert [layer.filled for layer in cache.layers] == [None] * LLAMA.n_layers
    before = [layer.slots for layer in cache.layers]
    for layer in cache.layers:
        layer.cumulative_length.add_(1)
    assert [layer.slots for layer in cache.layers] == [n + 1 for n in before]
    assert {layer.logical for layer in cache.layers} == {int(cache.get_seq_length())}


def stepped(model, cache, sequences, hidden, most):
    """Logits of one more token over what a `generate` left, with a mask that hides one token of the text."""
    mask = torch.ones(len(sequences), most, dtype=torch.long)
    mask[:, sequences.shape[1] :] = 0
    mask[:, hidden] = 0
    positions = torch.full((len(sequences), 1), sequences.shape[1] - 1)
    given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    with torch.no_grad():
        return model(input_ids=sequences[:, -1:], **given, use_cache=True).logits


@pytest.mark.parametrize("setup", [CASCADE, ALL_THREE, {"method": "snapkv", "keep": 9}], ids=["cascade", "all", "snap"])
def test_a_mask_of_somebody_elses_is_mapped_to_the_slots(setup):
    """In `generate` a mask that hides nothing is cut to the room; what comes after it may hide what it likes."""
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, (1,), seed=3)
    left = []
    for hidden in (0, 1):  # the first tokens are text, and stay in every layer
        found = []
        for cache in (growing(model), static(model)):
            sequences = answer(model, inputs, 3, past_key_values=cache).sequences
            most = 160 if isinstance(cache, StaticCache) else sequences.shape[1]
            found.append(stepped(model, cache, sequences, hidden, most))
        assert distance(*found) <= TOLERANCE
        left.append(found[0])
    assert distance(*left) > TOLERANCE  # it matters which token is hidden


def test_a_mask_that_hides_nothing_needs_no_table_of_positions():
    model, inputs = patched(LLAMA, **CASCADE), batch(LLAMA, (1, 1), seed=3)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    cache = static(model)
    expected = answer(model, inputs, past_key_values=growing(model))
    assert distance(answer(model, inputs, past_key_values=cache).logits, expected.logits) <= TOLERANCE
    assert any(layer.dropped for layer in cache.layers)
    assert [layer.fixed for layer in cache.layers] == [None] * LLAMA.n_layers
    assert not any(layer.sliced for layer in cache.layers)  # the generate is over
    assert not any(layer.ready for layer in cache.layers)  # for a compiled step, which may bring any mask


@pytest.mark.parametrize("kind", [growing, static], ids=["growing", "static"])
@pytest.mark.parametrize("setup", [CASCADE, {"method": "snapkv", "keep": 9}], ids=["cascade", "snapkv"])
def test_what_is_held_without_a_copy_is_a_cache_of_its_own_afterwards(kind, setup):
    """Neither keys nor values share memory with what the model computed, and all lie as transformers lays them."""
    model = patched(LLAMA, **setup)
    cache, made = kind(model), []
    handles = [
        layer.self_attn.v_proj.register_forward_hook(lambda *given: made.append(given[2]))
        for layer in model.model.language_model.layers
    ]
    answer(model, batch(LLAMA, (1,), seed=3), 0, past_key_values=cache)
    for handle in handles:
        handle.remove()
    theirs = {value.untyped_storage().data_ptr() for value in made}
    for layer in cache.layers:
        assert not layer.lends
        assert layer.keys.is_contiguous()
        assert layer.values.is_contiguous()
        assert layer.values.untyped_storage().data_ptr() not in theirs


@pytest.mark.parametrize("kind", [growing, static], ids=["growing", "static"])
def test_a_pass_that_fails_leaves_nothing_without_a_copy(kind):
    model = patched(LLAMA, **CASCADE)
    cache, inputs = kind(model), batch(LLAMA, (1,), seed=3)
    handle = model.model.language_model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer(model, inputs, 0, past_key_values=cache)
    handle.remove()
    assert not any(layer.lends for layer in cache.layers)
    assert torch.equal(answer(model, inputs).logits, answer(patched(LLAMA, **CASCADE), inputs).logits)


def test_after_a_pass_that_failed_the_host_asks_the_device():
    model = patched(LLAMA, **CASCADE)
    cache, inputs = static(model), batch(LLAMA, (1,), seed=2)

    def fail(*_):
        raise ValueError("stop")

    handle = model.model.language_model.layers[-1].register_forward_hook(fail)
    with pytest.raises(ValueError, match="stop"):
        model(**inputs, past_key_values=cache)
    handle.remove()
    assert [layer.filled for layer in cache.layers] == [None] * LLAMA.n_layers
    cache.reset()
    expected = answer(model, inputs, 3, past_key_values=static(model)).logits
    assert torch.equal(answer(model, inputs, 3, past_key_values=cache).logits, expected)
