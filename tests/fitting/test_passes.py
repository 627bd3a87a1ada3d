"""What stands for dropping in training is dropping: gates at 0 and 1 give the patched model's logits."""

from __future__ import annotations

import copy

import pytest
import torch

import mustdrop
import mustdrop.fidelity
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError, UnsupportedModelError, UnsupportedOptionError
from mustdrop.fitting.gates import FLOOR, counts, gated, hard_gates, soft_gates
from mustdrop.fitting.passes import Passes, frozen
from mustdrop.pruners.scorer import Scorer
from support.families import batch, clone

FAMILIES = [
    ("llava", "image"),
    ("llava_next", "image"),
    ("llava_onevision", "video"),
    ("qwen2_5_vl", "image"),
    ("qwen3_vl", "video"),
    ("gemma3", "image"),
    ("idefics3", "image"),
    ("mistral3", "image"),
]
KEEP = 0.4


def scorer(width, asks=False):
    torch.manual_seed(3)
    return Scorer(width, rank=8, asks=asks).requires_grad_(False)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "kind"), FAMILIES, ids=map("-".join, FAMILIES))
def test_hard_gates_are_the_patched_model(family, kind, attention, asks):
    """The same features are scored, the same ones stay, and the logits at the answer are the same."""
    if asks and attention == "eager":
        pytest.skip("what asks is tried under one backend")
    model = clone(family, attention)
    passes = Passes(model)
    inputs = passes.inputs(batch(registry()[family], model, ((kind, kind) if family == "llava" else (kind,),)))
    module = scorer(passes.width, asks)
    with frozen(model):
        answer = passes.answer(inputs, 4)
        prompt = passes.unpruned(inputs, answer)
        given = [prompt.question] if asks else []
        scores = [module(own[None], *given)[0] for own in prompt.features]
        gates = [hard_gates(s, n) for s, n in zip(scores, counts([len(s) for s in scores], KEEP), strict=True)]
        ours = passes.pruned(prompt, gates)
    # as many of the whole prompt, rows that always enter among them, as the gates leave
    total = int(torch.isin(inputs["input_ids"], torch.tensor(passes.tokens)).sum())
    gone = sum(int(gate.isinf().sum()) for gate in gates)
    forced = mustdrop.fidelity.Reference(torch.tensor([answer]), torch.tensor([len(answer)]), prompt.logits[None])
    with mustdrop.patched(model, "learned", keep=total - gone, importance=module):
        theirs = mustdrop.fidelity.forced_logits(model, inputs, forced.tokens)[0]
        kept = mustdrop.trace(model).kept(0).tolist()
    if len(prompt.features) == 1 or family == "llava":
        where = torch.cat(prompt.places)[~torch.cat(gates).isinf()]
        vision = torch.isin(inputs["input_ids"][0], torch.tensor(passes.tokens)).nonzero()[:, 0]
        structural = set(vision.tolist()) - set(torch.cat(prompt.places).tolist())
        assert sorted({*where.tolist(), *structural}) == vision[kept].tolist()
    assert (ours - theirs).abs().max() <= 1e-5
    assert (prompt.logits - mustdrop.fidelity.forced_logits(model, inputs, forced.tokens)[0]).abs().max() <= 1e-5


def test_open_gates_change_nothing_and_the_model_is_left_as_it_came():
    model = clone("llava").train()
    before = copy.deepcopy(model.state_dict())
    passes = Passes(model)
    inputs = passes.inputs(batch(registry()["llava"], model, (("image",),)))
    with frozen(model):
        prompt = passes.unpruned(inputs, [5, 6, 7])
        gate = torch.zeros(len(prompt.features[0]), requires_grad=True)
        logits = passes.pruned(prompt, [gate])
        assert (logits - prompt.logits).abs().max() <= 1e-5
        logits.log_softmax(-1)[0, 0].backward()
        assert bool(gate.grad.isfinite().all())
        assert bool((gate.grad != 0).any())
        assert all(weight.grad is None for weight in model.parameters())
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gates_add_up_to_the_budget_and_become_hard():
    torch.manual_seed(0)
    score = torch.randn(50, requires_grad=True)
    for count in (1, 7, 49):
        gate = soft_gates(score, count, 0.5).exp()
        assert abs(float(gate.detach().sum()) - count) < 1e-2
        near = soft_gates(score, count, 1e-3)
        assert torch.equal(near > -1, hard_gates(score, count) == 0)
        assert float(near.detach().min()) >= FLOOR
    gate.sum().backward()
    assert float(score.grad.abs().max()) < 1e-4, "what adds up to the budget cannot be raised by all scores together"


def test_the_gradient_is_that_of_the_gates_with_their_threshold():
    torch.manual_seed(1)
    score = torch.randn(12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_gates(s, 4, 0.7), (score,), eps=1e-6, atol=1e-5)
    nearly_hard = soft_gates(score, 4, 0.01, slope=0.7)
    assert (nearly_hard - soft_gates(score, 4, 0.01)).abs().max() <= 1e-12
    (nearly_hard * torch.linspace(1, 2, 12)).sum().backward()
    assert float(score.grad.abs().min()) > 1e-4, "with a slope of its own, every score has a gradient"


def test_masks_of_every_kind_become_additive():
    hidden = torch.zeros(1, 3, 4)
    gate = torch.tensor([0.0, -1.0, -torch.inf])
    lowest = torch.finfo(torch.float32).min
    causal = torch.tensor([[0, lowest, lowest], [0, -1, lowest], [0, -1, lowest]])
    see = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    for mask in (None, see, torch.zeros(1, 1, 3, 3).masked_fill(~see, lowest)):
        assert torch.equal(gated(mask, gate, hidden)[0, 0], causal)
    assert counts([10, 3], 0.25) == [2, 1]
    assert counts([10], 1.0) == [10]


def test_models_that_cannot_be_fitted_are_refused():
    with pytest.raises(UnsupportedModelError, match="recurrent layers"):
        Passes(clone("qwen3_5"))
    model = clone("llava")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedOptionError, match='attn_implementation="sdpa"'):
        Passes(model)


def test_samples_are_one_prompt_with_a_picture():
    model = clone("llava")
    passes = Passes(model)
    two = batch(registry()["llava"], model, (("image",), ("image",)))
    with pytest.raises(ConfigError, match=r"one prompt.*got input_ids of shape \(2, "):
        passes.inputs(two)
    with pytest.raises(ConfigError, match="got list"):
        passes.inputs([1])
    text = passes.inputs(batch(registry()["llava"], model, ((),)))
    with frozen(model), pytest.raises(ConfigError, match="without"):
        passes.unpruned(text, [3])
