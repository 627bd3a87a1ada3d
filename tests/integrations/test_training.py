"""Gradients through a patched model are those of the masked model: dropping is a choice, not a new function."""

from __future__ import annotations

import pytest
import torch
import transformers

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner, errors
from support.builders import IMAGE, LLAMA, SIGLIP, anatomy, batch, clone
from support.edges import BUDGETED
from support.masking_check import TOLERANCE, distance, merged_features, patched
from support.oracle import MaskedOracle, hidden_by

SETUPS = {
    "prefill": {"prefill": PrefillPruner(keep=0.5)},
    "thresholds": {"prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02)},
    "selecting": {"vision": VisionStagePruner(window=None, keep=11), "prefill": PrefillPruner(scale=1.0, bias=2.0)},
    "merging": {"vision": VisionStagePruner(window=3), "prefill": PrefillPruner(keep=1 / 3)},
    "all_three": {
        "vision": VisionStagePruner(window=3),
        "prefill": PrefillPruner(keep=1 / 3),
        "decode": DecodeCachePruner(),
    },
}


def labelled(variant=LLAMA, seed=11, images=(1, 2)):
    """Inputs whose last three tokens are the answer."""
    inputs = batch(variant, images, seed=seed, after=(6,) * len(images))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    labels[inputs["attention_mask"] == 0] = -100
    labels[:, :-3] = -100
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("variant", [LLAMA, SIGLIP], ids=str)
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_gradients_are_those_of_the_masked_model(setup, variant, training):
    model, oracle, inputs = patched(variant, **setup), clone(variant), labelled(variant)
    model.train(training)
    ours = model(**inputs)
    ours.loss.backward()
    trace = mustdrop.trace(model)
    hidden = hidden_by(trace, inputs["input_ids"], variant.n_layers)
    assert hidden.anything
    features = merged_features(variant, inputs, trace, setup.get("vision"), model=oracle, differentiable=True)
    with MaskedOracle(oracle, hidden, features):
        theirs = oracle(**inputs)
    theirs.loss.backward()
    assert (ours.loss - theirs.loss).abs() <= TOLERANCE
    reached = set()
    for (name, parameter), (_, other) in zip(model.named_parameters(), oracle.named_parameters(), strict=True):
        if other.grad is None or not bool(other.grad.abs().max() > 0):
            assert parameter.grad is None or not bool(parameter.grad.abs().max() > TOLERANCE), name
            continue
        scale = max(1.0, other.grad.abs().max().item())
        assert distance(parameter.grad, other.grad) <= TOLERANCE * scale, name
        reached.add(name.split(".")[1])
    assert reached >= {"vision_tower", "multi_modal_projector", "language_model"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BUDGETED)
def test_every_method_trains_on_what_it_keeps_without_gradients(name, dtype):
    model, inputs = patched(LLAMA, "sdpa", name, keep=16).to(dtype), labelled(images=(1, 1))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        loss = model(**inputs).loss
    kept = mustdrop.trace(model).tokens
    ours = model(**inputs).loss
    ours.backward()
    assert torch.equal(mustdrop.trace(model).tokens, kept)
    assert torch.equal(ours.detach(), loss)
    gradients = [
        part.grad
        for part in (*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters())
    ]
    assert all(g is None or bool(g.isfinite().all()) for g in gradients)
    assert any(g is not None and bool(g.abs().max() > 0) for g in gradients)


def test_scores_carry_no_gradient():
    """What decides is detached: a score that carried gradients would hold the attention's graph and train it."""
    model, inputs = patched(LLAMA, **SETUPS["all_three"]), labelled()
    model.train()
    seen = []
    layers = vars(model)["_mustdrop"].stage.layers
    original = layers._filter

    def spy(forward, media, k, hidden):
        seen.append(forward.attention.received())
        return original(forward, media, k, hidden)

    layers._filter = spy
    model(**inputs).loss.backward()
    del layers._filter
    assert seen
    assert not any(s.requires_grad for s in seen)


@pytest.mark.parametrize("part", ["model", "model.vision_tower", "model.language_model"])
def test_gradient_checkpointing_is_refused_in_training_before_any_work(part):
    model, inputs = patched(LLAMA, **SETUPS["prefill"]), labelled()
    model.gradient_checkpointing_enable()
    model.get_submodule(part).train()
    work = []
    modules = [model.model.vision_tower, *model.model.language_model.layers]
    handles = [module.register_forward_hook(lambda *_: work.append(1)) for module in modules]
    with pytest.raises(errors.UnsupportedOptionError, match=r"gradient_checkpointing_disable"):
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert not work
    model.gradient_checkpointing_disable()
    assert torch.isfinite(model(**inputs).loss)


class Conversations(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        inputs = labelled(seed=index, images=(1,))
        return {name: value[0] for name, value in inputs.items() if name != "pixel_values"} | {
            "pixel_values": inputs["pixel_values"][0]
        }


def trainer_of(model, folder, **options):
    options = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=Conversations(), eval_dataset=Conversations()
    )


def test_two_steps_of_the_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    model, before = patched(LLAMA, **SETUPS["all_three"]), clone()
    trainer = trainer_of(model, tmp_path / "run")
    result = trainer.train()
    assert result.global_step == 2
    assert mustdrop.trace(model).dropped_anything
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    trainer.save_model(tmp_path / "saved")
    mustdrop.unpatch(model).eval()
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    inputs = batch(LLAMA, (1,), seed=12)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert anatomy(again)[""]["class"] is anatomy(before)[""]["class"]


def test_the_trainer_with_gradient_checkpointing_is_refused(tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    trainer = trainer_of(patched(LLAMA, **SETUPS["prefill"]), tmp_path, gradient_checkpointing=True)
    with pytest.raises(errors.UnsupportedOptionError, match="gradient checkpointing"):
        trainer.train()
