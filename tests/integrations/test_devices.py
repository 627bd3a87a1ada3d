"""Layers on several devices, as `device_map="auto"` spreads them: the numbers of one device, bit for bit.

The devices are imitated (benchmarks/imitated_device.py): everything is computed on the CPU, and tensors that claim
different devices refuse to meet, as they would on real ones. The hooks that move tensors between layers are
accelerate's own.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from support.builders import IMAGE, LLAMA, SIGLIP, answer, batch, clone
from support.fake_devices import CPU, FIRST, SECOND, THIRD, Places, put
from support.masking_check import distance
from support.versions import tower_body

hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")

SETUPS = {
    "nothing": {"prefill": PrefillPruner(keep=1.0)},
    "merging": {
        "vision": VisionStagePruner(window=3),
        "prefill": PrefillPruner(keep=1 / 3),
        "decode": DecodeCachePruner(),
    },
    "evicting": {"prefill": PrefillPruner(keep=0.6), "decode": DecodeCachePruner(keep=6, interval=2)},
    "selecting": {"vision": VisionStagePruner(window=None, keep=11), "prefill": PrefillPruner(scale=1.0, bias=2.0)},
    "thresholds": {"prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02)},
    "released": {
        "vision": VisionStagePruner(compat="released"),
        "prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02, compat="released"),
    },
}


def spread(model, split_tower=False):
    """`model` over three devices: encoder on the third, projector and head on the second, decoder on all."""
    base, depth = model.model, len(model.model.language_model.layers)
    places = {model: FIRST, base.vision_tower: THIRD, base.multi_modal_projector: SECOND, model.lm_head: SECOND}
    for i, layer in enumerate(base.language_model.layers):
        places[layer] = (FIRST, SECOND, THIRD)[3 * i // depth]
    places[base.language_model.norm] = THIRD
    if split_tower:
        blocks = tower_body(model).encoder.layers
        places |= {block: (FIRST, THIRD)[2 * i // len(blocks)] for i, block in enumerate(blocks)}
    for module, device in places.items():
        put(module, device)
        hook = hooks.AlignDevicesHook(
            execution_device=device,
            io_same_device=module is model,
            skip_keys=model._skip_keys_device_placement,
        )
        hook.init_hook = lambda module: module  # the weights stay where they are: only claims move
        hooks.add_hook_to_module(module, hook)
    return model


def on(device, inputs):
    return {name: value.to(device) for name, value in inputs.items()}


@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=["one_row", "padded"])
@pytest.mark.parametrize(("variant", "attn"), [(LLAMA, "sdpa"), (SIGLIP, "eager")], ids=str)
@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_generate_gives_the_numbers_of_one_device(setup, variant, attn, images):
    inputs = batch(variant, images, seed=3)
    expected = answer(mustdrop.patch(clone(variant, attn), **setup), inputs, steps=5)
    model = mustdrop.patch(spread(clone(variant, attn)), **setup)
    with Places() as places:
        got = answer(model, on(FIRST, inputs), steps=5)
    assert places.seen >= {FIRST, SECOND, THIRD}
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(layer.keys.dtype == torch.float32 for layer in got.cache.layers)


@pytest.mark.parametrize("setup", ["merging", "selecting"])
def test_an_encoder_over_two_devices(setup):
    inputs = batch(LLAMA, (1, 2), seed=4)
    expected = answer(mustdrop.patch(clone(), **SETUPS[setup]), inputs, steps=2)
    model = mustdrop.patch(spread(clone(), split_tower=True), **SETUPS[setup])
    with Places():
        got = answer(model, on(FIRST, inputs), steps=2)
    assert torch.equal(got.logits, expected.logits)


@pytest.mark.parametrize("setup", ["merging", "thresholds"])
def test_beams_and_a_second_turn(setup):
    inputs = batch(LLAMA, (1, 1), seed=5)
    results = []
    for spreading in (False, True):
        model = clone()
        model = mustdrop.patch(spread(model) if spreading else model, **SETUPS[setup])
        with Places() if spreading else torch.no_grad():
            given = on(FIRST, inputs) if spreading else inputs
            beams = answer(model, given, steps=4, num_beams=3)
            first = answer(model, {**given, "past_key_values": DynamicCache(config=model.config.get_text_config())}, 3)
            words = torch.full((2, 4), 9, device=given["input_ids"].device)
            ids = torch.cat([first.sequences, words], 1)
            more = torch.ones(2, ids.shape[1] - given["input_ids"].shape[1], dtype=torch.long, device=words.device)
            mask = torch.cat([given["attention_mask"], more], 1)
            second = answer(model, {"input_ids": ids, "attention_mask": mask, "past_key_values": first.cache}, 3)
        results.append((beams, second))
    for alone, apart in zip(*results, strict=True):
        assert torch.equal(alone.sequences, apart.sequences)
        assert distance(alone.logits, apart.logits) == 0


def test_a_forward_with_labels():
    inputs = batch(LLAMA, (1, 2), seed=6, after=(6, 6))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    labels[:, :-3] = -100
    with torch.no_grad():
        expected = mustdrop.patch(clone(), **SETUPS["merging"])(**inputs, labels=labels).loss
        model = mustdrop.patch(spread(clone()), **SETUPS["merging"])
        with Places():
            got = model(**on(FIRST, inputs), labels=labels.to(FIRST)).loss
    assert torch.equal(got, expected)


def test_the_imitation_refuses_what_a_device_refuses():
    here, there = torch.ones(2), torch.ones(2)
    with Places():
        far = there.to("cuda:1")
        assert far.device == SECOND
        assert far.is_cuda
        assert (far + far).device == SECOND
        assert torch.zeros(3, device=far.device).device == SECOND
        assert far.new_zeros(2).device == SECOND
        assert (far + torch.tensor(1.0)).device == SECOND  # numbers may come from the CPU
        assert (far.cpu() + here).device == CPU
        with pytest.raises(RuntimeError, match="same device"):
            far + here
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([far, there.to("cuda:0")])
