"""`torch.compile` of a decode step over a static cache: one graph, whatever was dropped from the prompt."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from support.builders import LLAMA, QWEN2, Variant, answer, batch, clone, plain
from support.masking_check import TOLERANCE, distance, patched

CASCADE = {"prefill": PrefillPruner(keep=0.4), "decode": DecodeCachePruner()}
THRESHOLDS = {"prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02)}
ALL_THREE = {"vision": VisionStagePruner(window=3), **CASCADE}
RELEASED = {
    "vision": VisionStagePruner(compat="released"),
    "prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02, compat="released"),
}
MOST = 160


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def converse(model, inputs, step=None, steps=6):
    """(B, steps + 1, V) logits and the cache: a prompt as it is, then tokens through `step`."""
    mask, logits = inputs["attention_mask"], []
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=MOST)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    following, run = {**inputs, "position_ids": positions}, model
    with torch.no_grad():
        for _ in range(steps + 1):
            position = mask.sum(1, keepdim=True)
            wide = torch.nn.functional.pad(mask, (0, MOST - mask.shape[1]))
            logits.append(
                run(**{**following, "attention_mask": wide}, past_key_values=cache, use_cache=True).logits[:, -1]
            )
            following = {"input_ids": logits[-1].argmax(-1, keepdim=True), "position_ids": position}
            run = model if step is None else step
            mask = torch.cat([mask, torch.ones_like(position)], 1)
    return torch.stack(logits, 1), cache


def compiled(model, backend="eager"):
    """The model as one graph per shape, and the count of graphs."""
    count = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=count, fullgraph=True), count


def same(model, inputs, step):
    """The compiled steps give the numbers of the others."""
    expected, _ = converse(model, inputs)
    got, cache = converse(model, inputs, step)
    assert distance(got, expected) <= TOLERANCE
    return cache


@pytest.mark.parametrize(
    ("setup", "variant", "attn"),
    [
        (CASCADE, LLAMA, "sdpa"),
        (ALL_THREE, LLAMA, "eager"),
        ({**CASCADE, "prefill": PrefillPruner(keep=0.6)}, QWEN2, "sdpa"),
        ({"method": "random", "keep": 9}, LLAMA, "sdpa"),
        ({"method": "snapkv", "keep": 9}, LLAMA, "sdpa"),
    ],
    ids=["cascade", "eager", "qwen2", "random", "snapkv"],
)
@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=str)
def test_one_graph_for_all_steps_and_all_prompts_of_a_budget(setup, variant, attn, images):
    model = patched(variant, attn, **setup)
    step, count = compiled(model)
    rooms = set()
    for seed in (1, 2, 3):
        cache = same(model, batch(variant, images, seed=seed), step)
        rooms.add(tuple(layer.keys.shape[2] for layer in cache.layers))
    assert len(rooms) == 1
    assert min(min(rooms)) < MOST
    assert count.frame_count == 1


@pytest.mark.parametrize("setup", [THRESHOLDS, RELEASED], ids=["thresholds", "released"])
def test_where_the_data_decide_prompts_share_a_few_graphs(setup):
    """A size that has changed once is a symbol from then on."""
    model = patched(LLAMA, **setup)
    step, count = compiled(model)
    rooms = set()
    for seed in range(8):
        cache = same(model, batch(LLAMA, (1,), seed=seed), step)
        rooms.add(tuple(layer.keys.shape[2] for layer in cache.layers))
    assert len(rooms) > 2
    assert count.frame_count <= 4


@pytest.mark.parametrize("images", [(0,), (1,)], ids=["text", "whole"])
def test_a_prompt_that_lost_nothing(images):
    model = patched(LLAMA, **CASCADE if images == (0,) else {"prefill": PrefillPruner(keep=1.0)})
    step, count = compiled(model)
    inputs = batch(LLAMA, images)
    expected, _ = converse(plain(LLAMA), inputs)
    assert torch.equal(converse(model, inputs)[0], expected)
    assert distance(converse(model, inputs, step)[0], expected) <= TOLERANCE
    assert count.frame_count == 1


@pytest.mark.slow  # it calls a C++ compiler
def test_inductor():
    small = Variant(n_layers=3, grid=3)
    model = patched(small, prefill=PrefillPruner(keep=0.8, layers=(1,)), decode=DecodeCachePruner())
    step, count = compiled(model, "inductor")
    for seed in (1, 2):
        cache = same(model, batch(small, (1,), seed=seed), step)
    assert cache.layers[-1].keys.shape[2] < MOST
    assert count.frame_count == 1


@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=str)
def test_generate_compiles_its_steps(images):
    """As it does by itself on a GPU."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    model = patched(LLAMA, **ALL_THREE)
    static = {"cache_implementation": "static"}
    for seed in (1, 2):
        inputs = batch(LLAMA, images, seed=seed)
        expected, plainly = answer(model, inputs, **static, disable_compile=True), mustdrop.trace(model)
        got, trace = answer(model, inputs, **static, compile_config=config), mustdrop.trace(model)
        assert distance(got.logits, expected.logits) <= TOLERANCE
        assert torch.equal(got.sequences, expected.sequences)
        assert torch.equal(trace.kv_lengths, plainly.kv_lengths)
        assert trace.flops == plainly.flops
        assert trace.kv_bytes == plainly.kv_bytes
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_step_leaves_the_trace_of_the_prompt():
    model, inputs = patched(LLAMA, **CASCADE), batch(LLAMA, (1,))
    forward, count = compiled(model.forward)
    _, cache = converse(model, inputs, steps=0)
    trace = mustdrop.trace(model)
    for step in (compiled(model)[0], model):
        if step is model:  # the hooks of the model itself then run outside of the graph
            model.forward = forward
        with torch.no_grad():
            step(input_ids=torch.tensor([[5]]), past_key_values=cache)
        assert mustdrop.trace(model) is trace
    assert count.frame_count == 1


def test_patching_unpatching_and_patching_otherwise_are_noticed():
    model, inputs = clone(), batch(LLAMA, (1,), seed=1)
    step, _ = compiled(model)
    for setup in (None, CASCADE, RELEASED, None, ALL_THREE):
        if setup is None:
            mustdrop.unpatch(model)
            expected, _ = converse(plain(LLAMA), inputs)
            assert distance(converse(model, inputs, step)[0], expected) <= TOLERANCE
        else:
            same(mustdrop.patch(model, **setup), inputs, step)
