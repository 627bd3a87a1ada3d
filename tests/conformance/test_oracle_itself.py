"""The oracle is checked before it checks anything: hiding tokens equals a run on a sequence that never had them."""

from __future__ import annotations

import copy

import pytest
import torch

from support import fake_flash
from support.builders import LLAMA, QWEN2, SIGLIP, VARIANTS, answer, batch, clone, plain, vision_positions
from support.copies import copy_of
from support.masking_check import distance
from support.oracle import CacheWatch, Hidden, MaskedOracle


def hide(variant, ids, gone, from_layer=0):
    hidden = torch.zeros(variant.n_layers, *ids.shape, dtype=torch.bool)
    for row in range(ids.shape[0]):
        hidden[from_layer:, row, vision_positions(ids, row)[gone]] = True
    return Hidden(hidden, hidden)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", [LLAMA, QWEN2, SIGLIP], ids=str)
def test_hiding_from_layer_0_equals_a_sequence_without_the_tokens(variant, attn):
    model, inputs = plain(variant, attn), batch(variant)
    gone = torch.arange(variant.n_vision) % 3 != 0
    hidden = hide(variant, inputs["input_ids"], gone)
    with torch.no_grad(), MaskedOracle(model, hidden):
        masked = model(**inputs).logits
        embeds = {}
        handle = model.model.language_model.register_forward_pre_hook(
            lambda _, __, kwargs: embeds.update(kwargs), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
    with torch.no_grad():
        left = ~hidden.prefill[0, 0]
        positions = torch.arange(len(left))[left][None]
        short = model.model.language_model(
            inputs_embeds=embeds["inputs_embeds"][:, left],
            position_ids=positions,
            attention_mask=torch.ones_like(positions),
        ).last_hidden_state
    assert distance(model.lm_head(short), masked[:, left]) <= 1e-5
    assert distance(masked, model(**inputs).logits) > 1e-2


def test_hiding_nothing_changes_no_bit():
    model, inputs = plain(LLAMA), batch(LLAMA, (1, 2))
    expected = answer(model, inputs)
    with MaskedOracle(model, hide(LLAMA, inputs["input_ids"], torch.zeros(0, dtype=torch.long))):
        assert torch.equal(answer(model, inputs).logits, expected.logits)
    assert torch.equal(answer(model, inputs).logits, expected.logits)


def test_hidden_tokens_do_not_matter_while_decoding():
    model, inputs = plain(LLAMA), batch(LLAMA, (1, 2))
    gone = torch.arange(0, 30)
    features = torch.randn(2, 3, LLAMA.n_vision, 48)
    features[1, :, 30:] = features[0, :, 30:]
    features[1, 2] = features[0, 2]  # the second image of row 1 is not hidden
    answers = []
    for candidate in features:
        with MaskedOracle(model, hide(LLAMA, inputs["input_ids"], gone), features=candidate):
            answers.append(answer(model, inputs).logits)
    assert torch.equal(answers[0], answers[1])


def test_the_watch_sees_the_keys_a_layer_attends_to():
    model, inputs = plain(LLAMA), batch(LLAMA, (1, 2))
    nothing = hide(LLAMA, inputs["input_ids"], torch.zeros(0, dtype=torch.long))
    with MaskedOracle(model, nothing) as oracle, CacheWatch(model) as watch:
        answer(model, inputs, steps=3)
    found = watch.hidden_while_decoding(oracle.prompt_keys, inputs["input_ids"], nothing)
    assert sorted(found.steps) == [1, 2, 3]
    assert not found.anything
    watch.keys[2][4] = watch.keys[2][4].index_fill(2, torch.tensor([60]), 0.0)
    found = watch.hidden_while_decoding(oracle.prompt_keys, inputs["input_ids"], nothing)
    assert found.steps[2].nonzero().tolist() == [[4, 0, 60], [4, 1, 60]]
    assert not found.steps[1].any()
    assert not found.steps[3].any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_stand_in_for_flash_attention_equals_sdpa(variant, monkeypatch):
    fake_flash.install(monkeypatch)
    from support.builders import clone

    model, inputs = fake_flash.use(clone(variant)), batch(variant, (1, 2))
    expected, got = answer(plain(variant), inputs), answer(model, inputs)
    assert fake_flash.calls["varlen"]
    assert fake_flash.calls["fixed"]
    assert distance(got.logits, expected.logits) <= 1e-5
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("variant", [LLAMA, QWEN2], ids=str)
def test_a_copy_is_one_of_its_own(variant):
    """Copies are made another way than by `copy.deepcopy`: equal, tied alike, and none shares anything that changes."""
    model = plain(variant)
    first, second = clone(variant), clone(variant)
    expected = copy.deepcopy(model)
    for made in (first, second):
        assert answer(made, batch(variant)).logits.equal(answer(expected, batch(variant)).logits)
        for own, other in zip(made.modules(), expected.modules(), strict=True):
            assert (type(own), vars(own).keys()) == (type(other), vars(other).keys())
    first.config.text_config.vocab_size = 3
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    for other in (model, second):
        assert other.config.text_config.vocab_size == expected.config.text_config.vocab_size != 3
        assert all(a.equal(b) for a, b in zip(other.parameters(), expected.parameters(), strict=True))


def test_tied_weights_of_a_copy_are_tied():
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2), "second": torch.nn.Linear(2, 2)})
    model["second"].weight = model["first"].weight
    made = copy_of(model)
    assert made["second"].weight is made["first"].weight
    assert made["first"].weight is not model["first"].weight
