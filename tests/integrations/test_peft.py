"""LoRA and its kin: adapters act in a patched model as they do in a plain one, whichever came first."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import find
from mustdrop.cost import linear_flops
from support import families
from support.builders import LLAMA, anatomy, answer, batch, clone, plain
from support.masking_check import TOLERANCE, assert_dropping_equals_masking, distance
from support.oracle import MaskedOracle, hidden_by
from support.versions import peft_fits

peft = pytest.importorskip("peft", reason="peft is not installed")

MERGING = {"vision": VisionStagePruner(window=3), "prefill": PrefillPruner(keep=1 / 3), "decode": DecodeCachePruner()}
EVICTING = {"prefill": PrefillPruner(keep=0.6), "decode": DecodeCachePruner(keep=6, interval=2)}
SETUPS = pytest.mark.parametrize("setup", [MERGING, EVICTING], ids=["merging", "evicting"])
FITTING = pytest.mark.skipif(
    not peft_fits(), reason="transformers from 5.24 on asks for peft 0.22; older ones fail here unpatched too"
)
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "fc1", "linear_1"]  # decoder, encoder and projector


def tuned(model, **options):
    """`model` in a peft model whose adapters change every number (peft begins with adapters that change nothing)."""
    config = peft.LoraConfig(**{"r": 4, "target_modules": EVERYWHERE, "task_type": "CAUSAL_LM", **options})
    return stir(peft.get_peft_model(model, config)).eval()


def stir(model, seed=3):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=draw)
    return model


@pytest.mark.parametrize("order", ["patched_first", "the_peft_model", "the_model_inside"])
@SETUPS
def test_dropping_equals_masking_with_active_adapters(setup, order):
    inputs, oracle = batch(LLAMA, (1, 2), seed=3), tuned(clone()).get_base_model()
    if order == "patched_first":
        model = tuned(mustdrop.patch(clone(), **setup))
    else:
        model = tuned(clone())
        target = model if order == "the_peft_model" else model.get_base_model()
        assert mustdrop.patch(target, **setup) is target
    both = assert_dropping_equals_masking(
        model.get_base_model(),
        inputs,
        vision=setup.get("vision"),
        decode=setup["decode"],
        oracle_model=oracle,
    )
    assert distance(both.ours.logits[:, 0], answer(plain(), inputs).logits[:, 0]) > 1e-2  # the adapters act
    out = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    assert torch.equal(out, both.ours.sequences)
    assert mustdrop.trace(model) is mustdrop.trace(model.get_base_model())


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_unpatching_the_peft_model_gives_the_plain_peft_model(task):
    inputs, model = batch(LLAMA, (1, 2), seed=4), tuned(clone(), task_type=task)
    expected = answer(model, inputs)
    before = anatomy(model)  # after a run: transformers adds hooks of its own in the first
    with mustdrop.patched(model, **MERGING) as same:
        assert same is model
        assert not torch.equal(answer(model, inputs).logits, expected.logits)
    assert torch.equal(answer(model, inputs).logits, expected.logits)
    assert anatomy(model) == before
    assert mustdrop.trace(model).dropped_anything


@SETUPS
def test_merged_adapters_give_the_numbers_of_active_ones_and_the_model_stays_patched(setup):
    inputs, model = batch(LLAMA, (1, 2), seed=5), tuned(clone())
    reference = tuned(clone()).merge_and_unload()
    mustdrop.patch(model, **setup)
    active = answer(model, inputs)
    merged = model.merge_and_unload()
    assert merged is model.get_base_model()
    both = assert_dropping_equals_masking(
        merged, inputs, vision=setup.get("vision"), decode=setup["decode"], oracle_model=reference
    )
    assert distance(both.ours.logits, active.logits) <= TOLERANCE
    mustdrop.unpatch(merged)
    assert torch.equal(answer(merged, inputs).logits, answer(reference, inputs).logits)


def test_switching_adapters_off_and_to_others_is_seen_by_the_patch_that_was_there():
    inputs, model = batch(LLAMA, (1,), seed=6), mustdrop.patch(tuned(clone()), **MERGING)
    first = answer(model, inputs)
    with model.disable_adapter():
        off = answer(model, inputs)
    assert torch.equal(off.logits, answer(mustdrop.patch(clone(), **MERGING), inputs).logits)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    stir(model.get_base_model(), seed=9)
    model.set_adapter("second")
    both = assert_dropping_equals_masking(
        model.get_base_model(),
        inputs,
        vision=MERGING["vision"],
        decode=MERGING["decode"],
        oracle_model=mustdrop.unpatch(_copy(model)).get_base_model(),
    )
    assert not torch.equal(both.ours.logits, first.logits)


def _copy(model):
    other = tuned(clone())
    other.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    other.load_state_dict(model.state_dict())
    other.set_adapter("second")
    return other.eval()


@FITTING
def test_adapters_added_by_transformers_itself():
    inputs, setup = batch(LLAMA, (1, 2), seed=7), MERGING
    config = peft.LoraConfig(r=4, target_modules=EVERYWHERE)
    model, oracle = mustdrop.patch(clone(), **setup), clone()
    for each in (model, oracle):
        each.add_adapter(config)
        stir(each).eval()
    assert_dropping_equals_masking(model, inputs, vision=setup["vision"], decode=setup["decode"], oracle_model=oracle)


def test_the_account_counts_a_layer_and_its_active_adapters_once():
    inputs = batch(LLAMA, (1,), seed=8)
    bare = mustdrop.patch(clone(), **MERGING)
    answer(bare, inputs)
    model = mustdrop.patch(tuned(clone(), target_modules=["up_proj"]), **MERGING)
    answer(model, inputs)
    own, tokens = mustdrop.trace(bare).flops.parts, int(inputs["attention_mask"].sum())
    config = model.config.get_text_config()
    extra = 2 * 4 * (config.hidden_size + config.intermediate_size) * config.num_hidden_layers
    counted = mustdrop.trace(model).flops.parts
    assert counted["prefill"].unpruned == own["prefill"].unpruned + extra * tokens
    assert counted["vision"] == own["vision"]
    with model.disable_adapter():
        answer(model, inputs)
    assert mustdrop.trace(model).flops.parts["prefill"].unpruned == own["prefill"].unpruned
    answer(model.merge_and_unload(), inputs)
    assert mustdrop.trace(model).flops.parts["prefill"].unpruned == own["prefill"].unpruned


def test_training_adapters_of_a_patched_model_changes_only_them():
    inputs, model = batch(LLAMA, (1, 2), seed=9), tuned(clone())
    mustdrop.patch(model, **MERGING).train()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-3] = -100
    model(**inputs, labels=labels).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)
    assert any("language_model" in name for name in with_gradient)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", pytest.param("PrefixTuningConfig", marks=FITTING)])
def test_learned_prompts_stand_before_the_prompt_and_change_nothing_else(kind):
    """Prompt tuning puts rows before the embeddings, prefix tuning puts entries into the cache: four keys, both."""
    inputs, setup = batch(LLAMA, (1, 2), seed=10, after=(9, 9)), {"prefill": PrefillPruner(keep=0.5)}
    model, other = clone(), clone()
    wrapped = []
    for each in (model, other):
        torch.manual_seed(0)
        config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
        wrapped.append(peft.get_peft_model(each, config).eval())
    ours, oracle = wrapped
    mustdrop.patch(ours, **setup)
    got = answer(ours, inputs, steps=4)
    ids = torch.cat([torch.zeros(2, 4, dtype=torch.long), inputs["input_ids"]], 1)
    hidden = hidden_by(mustdrop.trace(ours), ids, LLAMA.n_layers)
    assert hidden.anything
    with MaskedOracle(other, hidden):
        expected = answer(oracle, inputs, steps=4)
    assert distance(got.logits, expected.logits) <= TOLERANCE
    assert torch.equal(got.sequences, expected.sequences)


def test_every_word_of_the_question_scores_under_prompt_tuning():
    """`generate` is given fewer ids than rows run; a question shorter than the learned prompt must still score."""
    inputs = batch(LLAMA, (1,), seed=11, after=(3,))
    plain(LLAMA)  # built before the seed is set
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    model = mustdrop.patch(peft.get_peft_model(clone(), config).eval(), prefill=PrefillPruner(keep=0.5))
    with torch.no_grad():
        model(**inputs)
    forward = mustdrop.trace(model)
    answer(model, inputs, steps=2)
    for layer in range(LLAMA.n_layers + 1):
        assert torch.equal(mustdrop.trace(model).kept(layer), forward.kept(layer))


def test_the_account_counts_experts_with_adapters_of_bare_parameters_like_the_experts():
    """Such adapters change the fused weights once per call; those of the linear layers beside them cost per token."""
    plainly, model = families.plain("qwen3_vl_moe"), families.clone("qwen3_vl_moe")
    before = [linear_flops(layer) for layer in find(plainly).decoder_layers(plainly)]
    bare = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    tuned(model, target_modules=["q_proj"], target_parameters=bare)
    layers = find(model).decoder_layers(model)
    assert "base_layer" in layers[0].mlp.experts._modules
    assert "base_layer" in layers[0].mlp.gate._modules
    query = find(plainly).decoder_layers(plainly)[0].self_attn.q_proj
    extra = 2 * 4 * (query.in_features + query.out_features)
    assert [linear_flops(layer) for layer in layers] == [flops + extra for flops in before]
