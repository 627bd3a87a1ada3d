"""Merging inside the encoder equals a tower written out by hand, and the trace says what became of every patch."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import PrefillPruner, VisionStagePruner
from support.builders import LLAMA, MISTRAL, QWEN2, SIGLIP, answer, batch, plain, row_alone
from support.masking_check import TOLERANCE, distance, patched
from support.reference_tower import encode

CASES = [
    (LLAMA, {"window": 3, "threshold": 0.8}),
    (LLAMA, {"window": 2, "threshold": 0.6, "layer": 1}),
    (MISTRAL, {"window": 3, "threshold": -1.0}),
    (QWEN2, {"window": 3, "threshold": 0.7}),  # 8x8 patches: the border does not fill a window and stays
    (QWEN2, {"window": 4, "threshold": 0.6}),
    (SIGLIP, {"window": 2, "threshold": 0.95}),
    (SIGLIP, {"window": 3, "threshold": 0.8, "layer": 1}),
]


def entering_states(model, inputs):
    """What the first decoder layer of a patched model is given: (B, n, D)."""
    seen = []
    handle = model.model.language_model.layers[0].register_forward_hook(lambda _, args, out: seen.append(args[0]))
    answer(model, inputs, steps=0)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("attn", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize(("variant", "knobs"), CASES, ids=str)
def test_merged_features_and_windows_equal_the_tower_by_hand(variant, knobs, attn, request):
    if attn == "flash_attention_2":
        request.getfixturevalue("flash")
    before = 3
    inputs = batch(variant, (2,), seed=1, before=(before - 1,))
    model = patched(variant, attn, vision=VisionStagePruner(**knobs))
    states, trace = entering_states(model, inputs), mustdrop.trace(model)
    first, slot, names, members = before, 0, [], {}
    for k in range(2):
        expected = encode(plain(variant), inputs["pixel_values"][k], **knobs)
        got = states[0, first : first + len(expected.names)]
        assert distance(got, expected.features) <= TOLERANCE
        names += (expected.names + k * variant.n_vision).tolist()
        for group in expected.members:
            members[slot] = [n + k * variant.n_vision for n in group]
            slot += 1
        first += len(expected.names) + 2  # two words between the images
    assert trace.kept(0).tolist() == names
    assert 0 < slot < 2 * variant.n_vision
    for place, group in members.items():
        assert (trace.assignment() == place).nonzero()[:, 0].tolist() == sorted(group)


@pytest.mark.parametrize("variant", [LLAMA, SIGLIP], ids=str)
def test_merging_makes_the_later_encoder_blocks_run_on_fewer_tokens(variant):
    from support.versions import tower_body

    model, inputs = patched(variant, vision=VisionStagePruner(window=2, threshold=0.8)), batch(variant)
    lengths = []
    for block in tower_body(model).encoder.layers:
        block.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    answer(model, inputs, steps=0)
    prefix = 1 if variant.tower == "clip" else 0
    left = len(mustdrop.trace(model).kept(0))
    assert left < variant.n_vision
    assert lengths[0] == variant.n_vision + prefix
    assert lengths[1:] == [left + prefix] * (len(lengths) - 1)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("variant", [LLAMA, SIGLIP], ids=str)
def test_selection_keeps_the_tokens_with_the_most_encoder_attention(variant, window):
    inputs = batch(variant, seed=2)
    model = patched(variant, vision=VisionStagePruner(window=window, keep=12))
    answer(model, inputs, steps=0)
    expected = encode(plain(variant), inputs["pixel_values"][0], window=window, at_least=12)
    assert mustdrop.trace(model).kept(0).tolist() == expected.best(12)


@pytest.mark.parametrize(("share", "window"), [(0.08, 3), (0.3, None), (0.2, 2)])
@pytest.mark.parametrize("variant", [LLAMA, SIGLIP], ids=str)
def test_protected_tokens_survive_every_filter(variant, share, window):
    inputs = batch(variant, seed=3)
    model = patched(
        variant,
        vision=VisionStagePruner(window=window, key_share=share),
        prefill=PrefillPruner(global_threshold=1.0, individual_threshold=1.0),
    )
    answer(model, inputs, steps=2)
    expected = encode(plain(variant), inputs["pixel_values"][0], window=window).key_set(share)
    assert set(mustdrop.trace(model).kept(variant.n_layers).tolist()) == expected


def test_a_key_layer_is_the_layer_whose_attention_is_read():
    inputs = batch(LLAMA, seed=4)
    chosen = set()
    for key_layer in (-1, -2, 1):
        model = patched(LLAMA, vision=VisionStagePruner(window=None, keep=8, key_layer=key_layer))
        answer(model, inputs, steps=0)
        kept = mustdrop.trace(model).kept(0).tolist()
        expected = encode(plain(LLAMA), inputs["pixel_values"][0], window=None, key_layer=key_layer)
        assert kept == expected.best(8)
        chosen.add(tuple(kept))
    assert len(chosen) == 3


def test_an_image_in_which_nothing_merges_is_scored_as_when_it_is_alone():
    """Beside one that merges it is not cut, and the other one's padding must not be seen."""
    inputs = batch(LLAMA, (1, 1), seed=3)
    noise = torch.randn(inputs["pixel_values"][1].shape, generator=torch.Generator().manual_seed(0))
    inputs["pixel_values"][1] = 3 * noise
    inputs["pixel_values"][0] = inputs["pixel_values"][0].mean((1, 2), keepdim=True)
    model = patched(LLAMA, vision=VisionStagePruner(window=2, threshold=0.97, keep=20))
    answer(model, inputs, steps=0)
    together = mustdrop.trace(model)
    assert (together.assignment(0) >= 0).sum() > len(together.kept(0, 0))  # windows merged
    assert (together.assignment(1) >= 0).sum() == len(together.kept(0, 1)) == 20  # none did
    for row in range(2):
        answer(model, row_alone(inputs, row), steps=0)
        assert torch.equal(mustdrop.trace(model).assignment(), together.assignment(row))
