"""On a device: the same decisions and the same numbers as on the CPU (nox -s gpu)."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

import mustdrop
import mustdrop.method
from mustdrop.adapters import registry
from mustdrop.stages import missing
from support import families
from support.builders import LLAMA, SIGLIP, answer, batch
from support.masking_check import distance, patched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = [
    {"keep": 0.4},
    {"keep": 0.3, "decode_keep": 4, "interval": 2},
    {"global_threshold": 0.02, "individual_threshold": 0.02},
    {"scale": 2.0, "bias": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("variant", [LLAMA, SIGLIP], ids=str)
def test_a_device_gives_the_decisions_and_the_logits_of_the_cpu(variant, settings):
    inputs = batch(variant, (1, 2))
    on_cpu = patched(variant, "sdpa", "mustdrop", **settings)
    on_device = patched(variant, "sdpa", "mustdrop", **settings).to("cuda")
    expected = answer(on_cpu, inputs)
    got = answer(on_device, {name: value.to("cuda") for name, value in inputs.items()})
    ours, theirs = mustdrop.trace(on_device), mustdrop.trace(on_cpu)
    for layer in range(variant.n_layers + 1):
        for sample in range(2):
            assert ours.kept(layer, sample).tolist() == theirs.kept(layer, sample).tolist()
    assert distance(got.logits.cpu(), expected.logits) <= 1e-3
    assert ours.kernels == "triton"


def test_keeping_everything_changes_no_bit_on_a_device():
    inputs = {name: value.to("cuda") for name, value in batch(LLAMA, (1, 2)).items()}
    model = patched(LLAMA, "sdpa", "mustdrop", keep=0.5).to("cuda")
    plain = answer(mustdrop.unpatch(model), inputs)
    kept = answer(mustdrop.patch(model, "mustdrop", keep=1.0), inputs)
    assert torch.equal(plain.logits, kept.logits)


METHODS = [name for name, recipe in mustdrop.method.registry().items() if "keep" in recipe.model_fields]
FAMILIES = families.PAIRS
TURNS = [(name, kind, METHODS[i % len(METHODS)]) for i, (name, kind) in enumerate(FAMILIES)]
TURNS += [("llava", "image", method) for method in METHODS] + [("qwen2_5_vl", "image", method) for method in METHODS]


def same_on_both(name, kind, method, steps=3, **options):
    """In float64, where rounding decides nothing: decisions and answers of the CPU and of the device."""
    adapter = registry()[name]
    if missing(mustdrop.method.find(method, keep=0.5), adapter):
        pytest.skip("this family lacks a stage of this method")
    model = families.clone(name)
    exact = not any(
        "experts" in name for name, _ in model.named_parameters()
    )  # torch has no grouped product of doubles
    model = model.to(torch.float64 if exact else torch.float32)
    inputs = families.cast(batch_of(adapter, model, kind), model.dtype)
    on_device = copy.deepcopy(model).to("cuda")
    cost = 0.5 if mustdrop.method.find(method).prefill is None else 0.8
    answers, traces = [], []
    for one, given in ((model, inputs), (on_device, {key: value.to("cuda") for key, value in inputs.items()})):
        mustdrop.patch(one, method, keep=cost)
        answers.append(answer(one, given, steps, **options))
        traces.append(mustdrop.trace(one))
    ours, theirs = traces
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.kv_lengths, theirs.kv_lengths)
    if not exact:
        return
    for layer in range(ours.tokens.shape[0] + 1):
        for sample in range(ours.tokens.shape[1]):
            assert ours.kept(layer, sample).tolist() == theirs.kept(layer, sample).tolist(), (layer, sample)
    # logits come out in float32
    assert distance(answers[0].logits, answers[1].logits.cpu()) <= 1e-5


def batch_of(adapter, model, kind):
    """One medium, none, two."""
    return families.batch(adapter, model, ((kind,), (), (kind, kind)))


@pytest.mark.parametrize(("name", "kind", "method"), TURNS, ids=map("-".join, TURNS))
def test_every_family_and_every_method_decides_as_on_the_cpu(name, kind, method):
    same_on_both(name, kind, method)


WAYS = [
    {"num_beams": 3},
    {"num_return_sequences": 2, "num_beams": 2},
    {"cache_implementation": "static", "disable_compile": True},
    {"use_cache": False},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("method", ["mustdrop", "fastv", "h2o", "snapkv"])
def test_every_way_of_generating_decides_as_on_the_cpu(method, options):
    same_on_both("llava", "image", method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_the_kernels_keep_as_much_as_the_references(method):
    adapter, model = registry()["llava"], families.clone("llava").to("cuda")
    inputs = {name: value.to("cuda") for name, value in batch_of(adapter, model, "image").items()}
    mustdrop.patch(model, method, keep=0.5 if mustdrop.method.find(method).prefill is None else 0.8)
    traces = []
    for choice in ("triton", "reference"):
        mustdrop.kernels.use_kernels(choice)
        try:
            answer(model, inputs, steps=3)
        finally:
            mustdrop.kernels.use_kernels("auto")
        traces.append(mustdrop.trace(model))
    assert torch.equal(traces[0].tokens, traces[1].tokens)
    assert torch.equal(traces[0].kv_lengths, traces[1].kv_lengths)


def test_nothing_is_asked_of_a_device_while_it_decodes():
    """Decode steps over a pruned cache launch what an unpatched model launches, and wait for nothing more."""
    model = families.clone("llava").to("cuda")
    made = families.batch(registry()["llava"], model, (("image",),))  # rows of different lengths need a mask per step
    inputs = {name: value.to("cuda") for name, value in made.items()}
    launches = {}
    for name in ("unpatched", "patched"):
        if name == "patched":
            mustdrop.patch(model, "mustdrop", keep=0.8)
        count = functools.partial(launched, model, inputs)
        launches[name] = count(9) - count(1)
    assert launches["patched"] <= launches["unpatched"] + 8 * 2


def launched(model, inputs, steps):
    """Operations of one generate that start something on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        answer(model, inputs, steps)
        torch.cuda.synchronize()
    names = ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC", "cudaMemcpyAsync")
    return sum(event.count for event in seen.key_averages() if event.key in names)
