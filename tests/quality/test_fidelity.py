"""Fidelity: forcing answers through `generate` measures what the pruned model would do by itself."""

from __future__ import annotations

import math

import pytest
import torch

import mustdrop
from mustdrop import fidelity
from mustdrop.adapters import registry
from mustdrop.demo.model import load, prompt
from mustdrop.demo.scenes import SceneMaker
from mustdrop.errors import ConfigError
from tests.families import build, fixture_of, inputs_of

PIL = pytest.importorskip("PIL.Image")


def random_prompt(family="llava", kind="image", seed=0):
    adapter = registry()[family]
    model = build(adapter)
    generator = torch.Generator().manual_seed(seed)
    picture = torch.rand(*fixture_of(adapter).sizes(kind)[0], generator=generator)
    return model, inputs_of(adapter, model, kind, [picture])


@pytest.fixture(scope="module")
def asked():
    """The bundled model, and a batch of prompts of different lengths, one of them without an image, padded."""
    model, processor = load()
    maker = SceneMaker("selection", seed=3)
    scene = maker.scene()
    texts = [prompt(processor, maker.question(scene, kind).text) for kind in ("describe", "count")]
    image = PIL.fromarray(scene.image)
    texts.append("USER: describe the red one ASSISTANT:")
    return model, processor(text=texts, images=[image, image], return_tensors="pt", padding=True)


def test_nothing_dropped_is_exactly_the_unpruned_model(asked):
    model, inputs = asked
    reference = fidelity.reference(model, inputs)
    assert reference.lengths[0] == 6
    assert reference.lengths[1] == 2
    with mustdrop.patched(model, "none"):
        found = fidelity.measure(model, inputs, reference)
    assert torch.equal(found.kl, torch.zeros(3))
    assert torch.equal(found.agreement, torch.ones(3))
    assert found.same.all()


def test_the_same_answer_is_what_generate_would_say(asked):
    model, inputs = asked
    reference = fidelity.reference(model, inputs)
    seen = set()
    for keep in (0.5, 0.02):
        with mustdrop.patched(model, "uniform", keep=keep):
            found = fidelity.measure(model, inputs, reference)
            free = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        for row in range(3):
            length = int(reference.lengths[row])
            own = free[row, :length].tolist() == reference.tokens[row, :length].tolist()
            assert bool(found.same[row]) == own
            seen.add(own)
        assert found.same[2]  # nothing to drop in a prompt without an image
    assert seen == {True, False}


def test_a_row_of_a_batch_counts_as_it_does_alone(asked):
    model, inputs = asked
    reference = fidelity.reference(model, inputs)
    with mustdrop.patched(model, keep=0.1):
        together = fidelity.measure(model, inputs, reference)
        pad = int((inputs["attention_mask"][1] == 0).sum())
        alone = {name: inputs[name][1:2, pad:] for name in ("input_ids", "attention_mask")}
        alone["pixel_values"] = inputs["pixel_values"][1:2]
        length = int(reference.lengths[1])
        logits = fidelity.forced_logits(model, alone, reference.tokens[1:2, :length])
    one = fidelity.compare(reference.logits[1:2, :length], logits, reference.lengths[1:2])
    torch.testing.assert_close(one.kl, together.kl[1:2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("family", "kind"), [("qwen2_5_vl", "image"), ("video_llava", "video")])
def test_random_models_of_any_family(family, kind):
    model, inputs = random_prompt(family, kind)
    reference = fidelity.reference(model, inputs, max_new_tokens=4)
    assert reference.lengths.tolist() == [4]
    with mustdrop.patched(model, "none"):
        assert fidelity.measure(model, inputs, reference).kl.item() == 0
    with mustdrop.patched(model, "random", keep=0.25):
        assert fidelity.measure(model, inputs, reference).kl.item() > 0
        again = fidelity.reference(model, inputs, max_new_tokens=4)  # of the unpruned model, though it is patched
        assert mustdrop.patching._runtime(model).method.name == "random"
    assert torch.equal(again.logits, reference.logits)


def test_divergence_and_agreement_against_known_values():
    unpruned = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [1.0, 1.0]]]).log()
    pruned = torch.tensor([[[0.25, 0.75], [0.9, 0.1], [0.1, 0.9]]]).log()
    found = fidelity.compare(unpruned, pruned, torch.tensor([2]))  # the third token is padding
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2
    assert found.kl.item() == pytest.approx(expected, rel=1e-6)
    assert found.agreement.item() == 0.5
    assert not found.same.item()
    tokens = torch.tensor([[1, 0, 0]])
    assert fidelity.log_likelihood(pruned, tokens, torch.tensor([2])).item() == pytest.approx(math.log(0.75 * 0.9))


def test_impossible_tokens_do_not_spoil_the_divergence():
    unpruned = torch.tensor([[[0.0, -torch.inf, 0.0]]])
    pruned = torch.tensor([[[0.0, 0.0, 0.0]]])
    assert fidelity.compare(unpruned, pruned, torch.tensor([1])).kl.item() == pytest.approx(math.log(1.5))


def test_inputs_that_cannot_be_compared_are_refused(asked):
    model, inputs = asked
    with pytest.raises(ConfigError, match="with input_ids; got pixel_values"):
        fidelity.reference(model, {"pixel_values": inputs["pixel_values"]})
    with pytest.raises(ConfigError, match=r"one answer for each of 3 prompts.*\(2, 4\)"):
        fidelity.forced_logits(model, inputs, torch.zeros(2, 4, dtype=torch.long))
