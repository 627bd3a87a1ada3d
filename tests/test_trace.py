"""The trace tells the truth: shapes, budgets, indices, accounting, table, JSON, picture, warnings."""

from __future__ import annotations

import gc
import json
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import DynamicCache, StaticCache

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner, patching
from mustdrop.errors import NothingDroppedWarning, NotPatchedError
from support.builders import IMAGE, LLAMA, MISTRAL, QWEN2, SIGLIP, VARIANTS, answer, batch, clone, plain
from support.masking_check import patched

ALL_THREE = {
    "vision": VisionStagePruner(),
    "prefill": PrefillPruner(keep=0.4),
    "decode": DecodeCachePruner(keep=5, interval=2),
}


def ran(variant=LLAMA, images=(1, 0, 2), steps=3, seed=0, **setup):
    """A patched model after one generate, its inputs and its trace."""
    model, inputs = patched(variant, **(setup or ALL_THREE)), batch(variant, images, seed=seed)
    answer(model, inputs, steps=steps)
    return model, inputs, mustdrop.trace(model)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(
    "setup",
    [
        {},
        {"prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02)},
        {"vision": VisionStagePruner(window=None, keep=0.3)},
        {"decode": DecodeCachePruner(keep=4, interval=1)},
    ],
    ids=["all_three", "thresholds", "vision", "decode"],
)
def test_tokens_kept_assignment_and_lengths_agree_with_each_other(variant, setup):
    _, inputs, trace = ran(variant, **setup)
    layers, rows = variant.n_layers, 3
    assert trace.tokens.shape == trace.kv_lengths.shape == (layers, rows)
    assert trace.tokens.dtype == trace.kv_lengths.dtype == trace.total.dtype == torch.long
    assert trace.total.tolist() == [variant.n_vision, 0, 2 * variant.n_vision]
    assert torch.allclose(trace.equal_tokens, trace.tokens.float().mean(0))
    for row in range(rows):
        previous = torch.arange(trace.total[row])
        for layer in range(layers + 1):
            kept = trace.kept(layer, row)
            assert kept.dtype == torch.long
            assert kept.tolist() == sorted(set(kept.tolist()))
            assert torch.isin(kept, previous).all()
            if layer < layers:
                assert trace.tokens[layer, row] == len(kept)
            previous = kept
        assignment = trace.assignment(row)
        assert assignment.shape == (trace.total[row],)
        alive = trace.kept(0, row)
        assert sorted(set(assignment.tolist()) - {-1}) == list(range(len(alive)))
        assert assignment[alive].tolist() == list(range(len(alive)))  # a slot is named by one of its own tokens
        text = int(inputs["attention_mask"][row].sum()) - int(trace.total[row])
        assert (trace.kv_lengths[:, row] >= text + 3).all()
        assert (trace.kv_lengths[:, row] <= trace.tokens[:, row] + text + 3).all()
    assert "sdpa" in trace.backend


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9, 1 / 3])
@pytest.mark.parametrize("variant", [LLAMA, SIGLIP, QWEN2], ids=str)
def test_the_equal_token_budget_of_a_run_is_met(variant, keep):
    model, inputs = mustdrop.patch(clone(variant), "mustdrop", keep=keep), batch(variant, (1, 0, 3), seed=1)
    answer(model, inputs, steps=0)
    trace = mustdrop.trace(model)
    for row, images in enumerate((1, 0, 3)):
        budget = keep * images * variant.n_vision
        assert trace.equal_tokens[row] <= budget + 1e-4
        assert trace.equal_tokens[row] > budget - 1 or not images


@pytest.mark.parametrize("keep", [13, 20, 35])
def test_a_budget_in_tokens_holds_for_every_prompt_of_a_batch(keep):
    model = mustdrop.patch(clone(LLAMA), "mustdrop", keep=keep)
    answer(model, batch(LLAMA, (1, 0, 2), seed=2), steps=0)
    equal = mustdrop.trace(model).equal_tokens
    assert equal[1] == 0
    for row in (0, 2):
        assert keep - 1 < equal[row] <= keep + 1e-4


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from([LLAMA, MISTRAL, SIGLIP]),
    st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(any),
    st.floats(0.12, 1.0),
    st.sampled_from([None, 2, 3]),
    st.integers(0, 50),
)
def test_the_budget_is_met_for_any_images_and_windows(variant, images, keep, window, seed):
    model = mustdrop.patch(clone(variant), "mustdrop", keep=keep, window=window)
    inputs = batch(variant, tuple(images), seed=seed)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingDroppedWarning)
        model(**inputs)
    trace = mustdrop.trace(model)
    for row, count in enumerate(images):
        budget = keep * count * variant.n_vision
        assert trace.equal_tokens[row] <= budget + 1e-3
        assert not count or trace.equal_tokens[row] > budget - 1 - 1e-3


def test_the_trace_describes_the_last_call():
    model, inputs, trace = ran(images=(1,))
    with torch.no_grad():
        model(**batch(LLAMA, (2, 2), seed=5))
    later = mustdrop.trace(model)
    assert later.total.tolist() == [72, 72]
    assert trace.total.tolist() == [36]  # a trace is not changed by later calls
    answer(model, inputs, steps=3)
    assert torch.equal(mustdrop.trace(model).tokens, trace.tokens)


def test_the_trace_of_an_unpatched_model_or_before_a_run_is_an_error():
    with pytest.raises(NotPatchedError):
        mustdrop.trace(clone())
    with pytest.raises(NotPatchedError, match="run"):
        mustdrop.trace(patched(**ALL_THREE))


@pytest.mark.parametrize("ask", [lambda t: t.kept(99), lambda t: t.kept(0, 7), lambda t: t.assignment(7)])
def test_asking_for_a_layer_or_sample_that_does_not_exist_is_an_error(ask):
    with pytest.raises((IndexError, ValueError)):
        ask(ran()[2])


# ---------------------------------------------------------------------------------------------------------- accounting


def text_flops(config, new, keys):
    """Multiply-adds times two of one decoder layer: ``new`` rows of queries against ``keys`` (query, key) pairs."""
    d, m = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * (d // config.num_attention_heads)
    return 2 * new * (2 * d * d + 2 * d * kv + 3 * d * m) + 2 * 2 * keys * d


def test_keeping_all_costs_what_the_plain_model_costs():
    with pytest.warns(NothingDroppedWarning):
        _, _, trace = ran(prefill=PrefillPruner(keep=1.0))
    assert trace.flops.ratio == pytest.approx(1)
    assert trace.flops.actual == trace.flops.unpruned
    assert trace.kv_bytes.actual == trace.kv_bytes.unpruned
    for part in trace.flops.parts.values():
        assert part.actual == part.unpruned


def test_flops_cover_tower_projector_prefill_and_decode_step():
    _, _, trace = ran(vision=VisionStagePruner(window=2, threshold=0.8), prefill=PrefillPruner(keep=0.4))
    parts = trace.flops.parts
    for name in ("vision", "projector", "prefill", "decode_step"):
        part = parts[name]
        assert 0 < part.actual <= part.unpruned
        assert part.ratio == pytest.approx(part.actual / part.unpruned)
    assert parts["vision"].actual < parts["vision"].unpruned  # merged tokens do not run through the later blocks
    assert parts["prefill"].actual < parts["prefill"].unpruned
    assert parts["decode_step"].actual < parts["decode_step"].unpruned


def test_prefill_flops_follow_the_documented_formula():
    """Ratio of two runs, so that the convention (MACs or FLOPs, causal or full attention) does not matter."""
    config = plain(LLAMA).config.text_config
    _, inputs, trace = ran(images=(1,), prefill=PrefillPruner(global_threshold=0.02, individual_threshold=0.02))
    text = inputs["input_ids"].shape[1] - LLAMA.n_vision
    lengths = [text + int(n) for n in trace.tokens[:, 0]]
    bounds = []
    for pairs in (lambda n: n * n, lambda n: n * (n + 1) / 2):
        actual = sum(text_flops(config, n, pairs(n)) for n in lengths)
        unpruned = LLAMA.n_layers * text_flops(config, text + LLAMA.n_vision, pairs(text + LLAMA.n_vision))
        bounds.append(actual / unpruned)
    ratio = trace.flops.parts["prefill"].ratio
    assert min(bounds) - 0.02 <= ratio <= max(bounds) + 0.02  # scoring and the language head may be counted or not


def test_the_unpruned_flops_grow_with_the_prompt_and_not_with_the_method():
    prefill = {}
    for images in ((1,), (2,)):
        for keep in (0.4, 0.6):
            _, _, trace = ran(images=images, prefill=PrefillPruner(keep=keep))
            prefill[images, keep] = trace.flops.parts["prefill"]
    assert prefill[(1,), 0.4].unpruned == prefill[(1,), 0.6].unpruned < prefill[(2,), 0.4].unpruned
    assert prefill[(1,), 0.4].actual < prefill[(1,), 0.6].actual


# ------------------------------------------------------------------------------------------------ table, JSON, picture


def test_the_table_shows_layers_samples_budgets_and_costs():
    _, _, trace = ran()
    table = str(trace)
    for word in ("layer", "vision tokens", "cache", "tokens per layer", "FLOPs", "KV", "sample 2", "sdpa"):
        assert word in " ".join(table.split())
    for row in range(3):
        assert str(int(trace.total[row])) in table
    for count in set(trace.tokens[:, 0].tolist()):
        assert str(count) in table


def test_the_json_holds_everything_and_reads_back(tmp_path):
    _, _, trace = ran()
    text = trace.to_json(tmp_path / "trace.json")
    data = json.loads((tmp_path / "trace.json").read_text())
    assert data == json.loads(trace.to_json()) == json.loads(json.dumps(trace.to_dict()))
    assert text is None or json.loads(text) == data
    assert data["tokens"] == trace.tokens.tolist()
    assert data["kv_lengths"] == trace.kv_lengths.tolist()
    assert data["total"] == trace.total.tolist()
    assert data["equal_tokens"] == pytest.approx(trace.equal_tokens.tolist())
    assert data["backend"] == trace.backend
    assert data["flops"]["actual"] == pytest.approx(trace.flops.actual)
    assert data["kv_bytes"]["unpruned"] == trace.kv_bytes.unpruned


@pytest.mark.parametrize("source", ["pillow", "path"])
def test_the_picture_is_written_and_differs_with_what_was_kept(tmp_path, source):
    pytest.importorskip("matplotlib")
    pixels = (np.random.default_rng(0).random((48, 48, 3)) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    picture = {"pillow": Image.fromarray(pixels), "path": tmp_path / "image.png"}[source]
    written = []
    for name, keep in (("few", 0.45), ("many", 0.9)):
        _, _, trace = ran(images=(1,), prefill=PrefillPruner(keep=keep))
        trace.draw(picture, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        with Image.open(tmp_path / f"{name}.png") as image:
            written.append(np.asarray(image.convert("RGB")))
    assert min(written[0].shape[:2]) > 100
    assert written[0].shape != written[1].shape or (written[0] != written[1]).any()


def test_a_sample_of_a_batch_is_drawn_and_a_text_only_one_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    _, _, trace = ran(images=(1, 0), prefill=PrefillPruner(keep=0.5))
    image = Image.new("RGB", (40, 30), "teal")
    trace.draw(image, str(tmp_path / "a.png"), sample=0)
    assert (tmp_path / "a.png").stat().st_size > 500
    with pytest.raises(ValueError, match=r"image|vision"):
        trace.draw(image, tmp_path / "b.png", sample=1)


# -------------------------------------------------------------------------------------------------------------- warning


def test_a_run_in_which_nothing_was_dropped_warns_once():
    model, inputs = mustdrop.patch(clone(LLAMA), "mustdrop", keep=1.0), batch(LLAMA)
    with pytest.warns(NothingDroppedWarning) as caught:
        [answer(model, inputs, steps=3) for _ in range(2)]
    assert len([w for w in caught if issubclass(w.category, NothingDroppedWarning)]) == 1


@pytest.mark.parametrize(
    ("setup", "images"),
    [({}, (1,)), ({}, (0,)), ({"decode": DecodeCachePruner(keep=5, interval=2)}, (1,))],
    ids=["dropped", "text_only", "evicted_while_decoding"],
)
def test_no_warning_when_tokens_went_or_there_was_no_image(setup, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error", NothingDroppedWarning)
        _, inputs, _ = ran(images=images, **setup)
    assert (inputs["input_ids"] == IMAGE).any() == bool(sum(images))


# ------------------------------------------------------------------------------------------ made when somebody asks


def ended(model):
    """What the last call of a patched model left, of which nobody has asked for a trace."""
    left = patching._runtime(model).ledger.outcome().call
    assert "trace" not in vars(left)
    return left


@pytest.mark.parametrize("setup", [ALL_THREE, {"method": "mustdrop", "keep": 12}, {"method": "snapkv", "keep": 9}])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_trace_made_later_describes_the_call_as_it_ended(kind, setup):
    if kind is StaticCache and setup is ALL_THREE:
        setup = {**ALL_THREE, "decode": DecodeCachePruner()}
    inputs, made = batch(LLAMA, (1, 2), seed=7), []
    for later in (False, True):
        model = patched(LLAMA, **setup)
        options = {} if kind is DynamicCache else {"max_cache_len": 160}
        cache = kind(config=model.config.get_text_config(), **options)
        given = {name: value.clone() for name, value in inputs.items()}
        answer(model, given, steps=2, past_key_values=cache)
        left = ended(model)
        if later:  # all that a call refers to goes on
            for value in given.values():
                value.zero_()
            answer(model, batch(LLAMA, (1,), seed=8), steps=1)
            token = torch.ones(2, 1, dtype=torch.long)
            with torch.no_grad():
                model(input_ids=token, past_key_values=cache)
            cache.reset()
        made.append(left.trace.to_dict())
    assert made[0] == made[1]


def test_what_a_call_leaves_keeps_no_keys_and_no_model():
    model = patched(LLAMA, **ALL_THREE)
    cache = DynamicCache(config=model.config.get_text_config())
    answer(model, batch(LLAMA, (1,)), steps=2, past_key_values=cache)
    left, gone = ended(model), [weakref.ref(cache.layers[0].keys), weakref.ref(cache.layers[0].values)]
    gone.append(weakref.ref(model))
    mustdrop.unpatch(model)
    del cache, model
    gc.collect()
    assert [one() for one in gone] == [None] * 3
    assert left.trace.dropped_anything


def test_what_a_call_leaves_can_be_saved_with_the_model():
    model = patched(LLAMA, **ALL_THREE)
    answer(model, batch(LLAMA, (1, 2)), steps=1)
    again = pickle.loads(pickle.dumps(ended(model)))
    assert again.trace.to_dict() == mustdrop.trace(model).to_dict()


@pytest.mark.parametrize("keep", [9, 36])
def test_what_a_call_leaves_knows_whether_anything_was_dropped(keep):
    model = patched(LLAMA, method="mustdrop", keep=keep)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingDroppedWarning)
        answer(model, batch(LLAMA, (1,)), steps=1, use_cache=False)
    left = ended(model)
    assert left.dropped_anything == left.trace.dropped_anything == (keep < 36)
