"""The cache really shrinks: fewer stored entries and fewer bytes, not a mask over all of them."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.errors import CacheStateError
from support.builders import IMAGE, LLAMA, MISTRAL, QWEN2, answer, batch, plain, vision_positions
from support.masking_check import patched

THRESHOLDS = PrefillPruner(global_threshold=0.02, individual_threshold=0.02)


def stored_bytes(cache):
    """Bytes of the storages behind the cache's tensors, per layer."""
    return [sum(t.untyped_storage().nbytes() for t in (layer.keys, layer.values)) for layer in cache.layers]


def text_length(inputs, row=0):
    return int(((inputs["input_ids"][row] != IMAGE) & inputs["attention_mask"][row].bool()).sum())


SETUPS = {
    "prefill": {"prefill": THRESHOLDS},
    "vision": {"vision": VisionStagePruner(window=3, keep=10)},
    "all three": {"vision": VisionStagePruner(), "prefill": PrefillPruner(keep=1 / 3), "decode": DecodeCachePruner()},
    "eviction": {"prefill": PrefillPruner(keep=0.6), "decode": DecodeCachePruner(keep=5, interval=2)},
    "eviction only": {"decode": DecodeCachePruner(keep=5, interval=2)},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_the_storage_holds_exactly_the_kept_entries(setup):
    model, inputs = patched(LLAMA, **SETUPS[setup]), batch(LLAMA, (1,), seed=1)
    out, trace = answer(model, inputs, steps=6), mustdrop.trace(model)
    text = plain(LLAMA).config.text_config
    entry = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    assert stored_bytes(out.cache) == [int(n) * entry for n in trace.kv_lengths[:, 0]]
    whole = answer(plain(LLAMA), inputs, steps=6)
    assert sum(stored_bytes(out.cache)) < sum(stored_bytes(whole.cache))
    assert trace.kv_bytes.actual == sum(stored_bytes(out.cache))
    assert trace.kv_bytes.unpruned == sum(stored_bytes(whole.cache))
    assert trace.kv_bytes.ratio == pytest.approx(trace.kv_bytes.actual / trace.kv_bytes.unpruned)


@pytest.mark.parametrize("setup", SETUPS)
def test_a_batch_stores_as_many_entries_as_its_longest_row(setup):
    model, inputs = patched(MISTRAL, **SETUPS[setup]), batch(MISTRAL, (1, 0, 2), seed=2)
    out, trace = answer(model, inputs, steps=6), mustdrop.trace(model)
    longest = inputs["input_ids"].shape[1] + 6
    for layer, lengths in zip(out.cache.layers, trace.kv_lengths, strict=True):
        assert layer.keys.shape[2] >= int(lengths.max())
        assert layer.keys.shape[2] <= longest
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    assert sum(layer.keys.shape[2] for layer in out.cache.layers) < longest * MISTRAL.n_layers
    if setup in ("all three", "eviction", "eviction only"):
        for layer, lengths in list(zip(out.cache.layers, trace.kv_lengths, strict=True))[2:]:
            assert layer.keys.shape[2] == int(lengths.max())


def test_the_cascade_cuts_earlier_layers_to_what_later_layers_kept():
    inputs = batch(LLAMA, (1, 2), seed=3)
    for full_layers in (0, 2, 4):
        model = patched(LLAMA, prefill=THRESHOLDS, decode=DecodeCachePruner(full_layers=full_layers))
        answer(model, inputs, steps=3)
        trace = mustdrop.trace(model)
        for row in range(2):
            for layer in range(LLAMA.n_layers):
                at = LLAMA.n_layers if layer >= full_layers else layer
                alive = len(trace.kept(at, row))
                assert trace.kv_lengths[layer, row] == text_length(inputs, row) + alive + 3
    assert (trace.tokens[0] > trace.tokens[-1]).all()


def test_without_the_cascade_every_layer_keeps_what_it_processed():
    model, inputs = patched(LLAMA, prefill=THRESHOLDS, decode=DecodeCachePruner(cascade=False)), batch(LLAMA, (2,))
    answer(model, inputs, steps=3)
    trace = mustdrop.trace(model)
    assert torch.equal(trace.kv_lengths, trace.tokens + text_length(inputs) + 3)
    assert len(set(trace.kv_lengths[:, 0].tolist())) > 1


@pytest.mark.parametrize(("keep", "interval", "steps"), [(5, 2, 7), (5, 3, 3), (5, 3, 4), (0.25, 1, 2), (9, 4, 9)])
def test_evictions_happen_every_interval_steps_and_leave_keep_vision_entries(keep, interval, steps):
    model = patched(LLAMA, prefill=PrefillPruner(keep=0.8), decode=DecodeCachePruner(keep=keep, interval=interval))
    inputs = batch(LLAMA, (1, 2), seed=4)
    answer(model, inputs, steps=steps)
    trace = mustdrop.trace(model)
    for row in range(2):
        total = int(trace.total[row])
        budget = keep if isinstance(keep, int) else int(keep * total)
        for layer in range(LLAMA.n_layers):
            alive = len(trace.kept(LLAMA.n_layers if layer >= 2 else layer, row))
            expected = min(alive, budget) if steps > interval else alive
            assert trace.kv_lengths[layer, row] == text_length(inputs, row) + expected + steps


def test_the_least_attended_entries_leave_first():
    """Scores come from the generated tokens alone, checked against the attention that the plain model reports."""
    inputs = batch(QWEN2, (1,), seed=5)
    model = patched(QWEN2, decode=DecodeCachePruner(keep=10, interval=2))
    out = answer(model, inputs, steps=3)
    where = vision_positions(inputs["input_ids"], 0)
    reference = answer(plain(QWEN2, "eager"), inputs, steps=3)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():  # steps 1 and 2 attend before the first eviction, which comes before step 3
        ids = reference.sequences[:, : length + 2]
        attention = plain(QWEN2, "eager")(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"],
            output_attentions=True,
        ).attentions
    for layer, stored in enumerate(out.cache.layers):
        given = attention[layer][0].mean(0)[length : length + 2][:, where].sum(0)
        kept = where[given.argsort(descending=True)[:10]].sort().values
        expected = reference.cache.layers[layer].keys[0][:, kept]
        apart = (stored.keys[0].transpose(0, 1)[:, None] - expected.transpose(0, 1)[None]).abs().amax((2, 3))
        assert apart.amin(0).max() < 1e-3  # every expected entry is stored (other entries are units away)
        assert stored.keys.shape[2] == length - QWEN2.n_vision + 10 + 3


def test_a_pruned_cache_is_refused_by_a_model_that_is_not_patched():
    inputs, model = batch(LLAMA, seed=6), patched(LLAMA, prefill=THRESHOLDS)
    out = answer(model, inputs, steps=2)
    mustdrop.unpatch(model)
    following = {"input_ids": torch.tensor([[5]]), "past_key_values": out.cache}
    with pytest.raises(CacheStateError, match="patch"):
        model(**following)


def test_what_was_dropped_cannot_be_cropped_back():
    inputs, model = batch(LLAMA, seed=7), patched(LLAMA, prefill=THRESHOLDS)
    cache = answer(model, inputs, steps=4).cache
    before = [layer.keys.shape[2] for layer in cache.layers]
    cache.crop(-2)
    assert [layer.keys.shape[2] for layer in cache.layers] == [n - 2 for n in before]
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 2
    with pytest.raises(CacheStateError, match="crop"):
        cache.crop(-30)


def test_the_cache_reports_the_logical_length():
    inputs, model = batch(LLAMA, (1, 2), seed=8), patched(LLAMA, **SETUPS["all three"])
    cache = DynamicCache(config=model.config.get_text_config())
    answer(model, {**inputs, "past_key_values": cache}, steps=5)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 5
    assert all(layer.get_seq_length() == inputs["input_ids"].shape[1] + 5 for layer in cache.layers)
