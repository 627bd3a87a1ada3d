"""A shared prefix is computed once by the plain model; patched models go on from copies of its cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from support.builders import IMAGE, LLAMA, QWEN2, answer, batch, clone, image, plain
from support.masking_check import TOLERANCE, distance, merged_features, patched
from support.oracle import Hidden, MaskedOracle, hidden_by

MERGING = {"vision": VisionStagePruner(window=3), "prefill": PrefillPruner(keep=1 / 3), "decode": DecodeCachePruner()}
SELECTING = {"vision": VisionStagePruner(window=None, keep=11), "prefill": PrefillPruner(scale=1.0, bias=2.0)}
SETUPS = pytest.mark.parametrize("setup", [MERGING, SELECTING], ids=["merging", "selecting"])


def prefix_cache(model, ids):
    """What the plain model stores of a text, as transformers' guide to prefix caching does it."""
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=DynamicCache(config=model.config.get_text_config())).past_key_values


def words(n, seed):
    return torch.randint(2, IMAGE, (1, n), generator=torch.Generator().manual_seed(seed))


def prompt_after(prefix, seed, variant=LLAMA, images=(1,)):
    """A prompt that begins with the shared prefix; its own part has an image."""
    rest = batch(variant, images, seed=seed)
    ids = torch.cat([prefix.expand(len(images), -1), rest["input_ids"][:, 1:]], 1)
    mask = torch.cat([torch.ones(len(images), prefix.shape[1], dtype=torch.long), rest["attention_mask"][:, 1:]], 1)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": rest["pixel_values"]}


def cascade(setup):
    return setup["decode"].full_layers if "decode" in setup else None


@pytest.mark.parametrize("variant", [LLAMA, QWEN2], ids=str)
@SETUPS
def test_a_text_prefix_of_the_plain_model_and_an_image_in_the_continuation(setup, variant):
    oracle_model, model = plain(variant), patched(variant, **setup)
    prefix = torch.cat([torch.ones(1, 1, dtype=torch.long), words(9, 1)], 1)
    shared = prefix_cache(oracle_model, prefix)
    stored = [layer.keys.clone() for layer in shared.layers]
    for seed in (30, 31):  # two prompts go on from the same prefix
        inputs = prompt_after(prefix, seed, variant)
        ours = answer(model, {**inputs, "past_key_values": copy.deepcopy(shared)})
        trace = mustdrop.trace(model)
        hidden = hidden_by(trace, inputs["input_ids"], variant.n_layers, cascade_from=cascade(setup))
        assert hidden.anything
        with MaskedOracle(oracle_model, hidden, merged_features(variant, inputs, trace, setup.get("vision"))):
            theirs = answer(oracle_model, {**inputs, "past_key_values": copy.deepcopy(shared)})
        assert distance(ours.logits, theirs.logits) <= TOLERANCE
        assert torch.equal(ours.sequences, theirs.sequences)
        whole = answer(model, inputs)  # the same prompt without a cached prefix
        assert distance(ours.logits, whole.logits) <= TOLERANCE
        assert torch.equal(ours.sequences, whole.sequences)
    assert all(torch.equal(layer.keys, before) for layer, before in zip(shared.layers, stored, strict=True))
    assert {type(layer).__name__ for layer in shared.layers} == {"DynamicLayer"}


@SETUPS
def test_a_prefix_repeated_for_a_batch(setup):
    oracle_model, model = plain(LLAMA), patched(LLAMA, **setup)
    prefix = torch.cat([torch.ones(1, 1, dtype=torch.long), words(9, 2)], 1)
    shared = prefix_cache(oracle_model, prefix)
    shared.batch_repeat_interleave(2)
    inputs = prompt_after(prefix, 32, images=(1, 1))
    inputs = {**inputs, "input_ids": inputs["input_ids"].clone()}
    ours = answer(model, {**inputs, "past_key_values": copy.deepcopy(shared)})
    trace = mustdrop.trace(model)
    hidden = hidden_by(trace, inputs["input_ids"], LLAMA.n_layers, cascade_from=cascade(setup))
    with MaskedOracle(oracle_model, hidden, merged_features(LLAMA, inputs, trace, setup.get("vision"))):
        theirs = answer(oracle_model, {**inputs, "past_key_values": copy.deepcopy(shared)})
    assert distance(ours.logits, theirs.logits) <= TOLERANCE


@SETUPS
def test_a_prefix_of_the_patched_model_itself(setup):
    """A text has nothing to drop, so the patched model's own prefix is the plain model's."""
    model, prefix = patched(LLAMA, **setup), torch.cat([torch.ones(1, 1, dtype=torch.long), words(9, 3)], 1)
    own, other = prefix_cache(model, prefix), prefix_cache(plain(LLAMA), prefix)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(own.layers, other.layers, strict=True))
    inputs = prompt_after(prefix, 33)
    a = answer(model, {**inputs, "past_key_values": copy.deepcopy(own)})
    b = answer(model, {**inputs, "past_key_values": copy.deepcopy(other)})
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.sequences, b.sequences)


@SETUPS
def test_three_turns_with_a_new_image_in_each(setup):
    oracle_model, model = plain(LLAMA), patched(LLAMA, **setup)
    prefix = torch.cat([torch.ones(1, 1, dtype=torch.long), words(5, 4)], 1)
    shared = prefix_cache(oracle_model, prefix)
    caches = [copy.deepcopy(shared), copy.deepcopy(shared)]
    so_far = prefix
    gone = Hidden(*(torch.zeros(LLAMA.n_layers, 1, 0, dtype=torch.bool) for _ in range(2)))
    for turn in range(3):
        mine = [words(3, 40 + turn), torch.full((1, LLAMA.n_vision), IMAGE), words(4, 50 + turn)]
        ids = torch.cat([so_far, *mine], 1)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": image(LLAMA, 700 + turn)[None],
        }
        ours = answer(model, {**inputs, "past_key_values": caches[0]}, steps=4)
        trace = mustdrop.trace(model)
        assert trace.total.tolist() == [LLAMA.n_vision]
        new = ids.clone()
        new[:, : so_far.shape[1]] = 0  # the images of the turns before are in the cache
        own = hidden_by(trace, new, LLAMA.n_layers, cascade_from=cascade(setup))
        assert own.anything
        old = torch.zeros_like(own.decode)
        old[..., : gone.decode.shape[-1]] = gone.decode
        gone = Hidden(own.prefill | old, own.decode | old)
        fresh = {**inputs, "input_ids": new}
        with MaskedOracle(oracle_model, gone, merged_features(LLAMA, fresh, trace, setup.get("vision"))):
            theirs = answer(oracle_model, {**inputs, "past_key_values": caches[1]}, steps=4)
        assert distance(ours.logits, theirs.logits) <= TOLERANCE
        assert torch.equal(ours.sequences, theirs.sequences)
        so_far = ours.sequences
    stored = caches[0].layers[-1].keys.shape[2]
    assert stored < so_far.shape[1] - 2 * LLAMA.n_vision  # of three images, less than one is left
    assert caches[0].get_seq_length() == so_far.shape[1] - 1


def test_unpatching_in_the_middle_of_a_chat_is_refused_by_the_cache():
    model, inputs = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=34)
    first = answer(model, {**inputs, "past_key_values": DynamicCache(config=model.config.get_text_config())})
    ids = torch.cat([first.sequences, words(4, 5)], 1)
    with pytest.raises(mustdrop.errors.CacheStateError, match="not patched"):
        answer(clone(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.cache})
