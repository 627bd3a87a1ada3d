"""Every family, called in every way: by position, through `forward`, inside another call, under other defaults."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import find, registry
from support.builders import defaults
from support.families import batch, clone, fitting

from .test_families import FAMILIES

WAYS = (
    {"vision": VisionStagePruner(window=2, threshold=0.2), "prefill": PrefillPruner(keep=0.4)},
    {"prefill": PrefillPruner(keep=0.5), "decode": DecodeCachePruner()},
    {"vision": VisionStagePruner(window=None, keep=0.6), "decode": DecodeCachePruner(keep=4, interval=1)},
)


def pytest_generate_tests(metafunc):
    """Every family with its first kind of media; with the others too where more than turns are asked for.

    Of the two ways to set a device, families take one each, in turn.
    """
    pairs = FAMILIES
    if metafunc.config.getoption("--breadth") == "turns":
        pairs = [pair for i, pair in enumerate(FAMILIES) if pair[0] not in dict(FAMILIES[:i])]
    names, cases = ("name", "kind"), pairs
    if "default" in metafunc.fixturenames:
        ways = (("dtype", "device"), ("dtype", "context"))
        names = (*names, "default")
        cases = [(*pair, default) for i, pair in enumerate(pairs) for default in ways[i % 2]]
    if "name" in metafunc.fixturenames:
        metafunc.parametrize(names, cases, ids=map("-".join, cases))


def patched(name, kind):
    """A patched clone; the families take the ways in turn."""
    return mustdrop.patch(clone(name), **fitting(name, WAYS[FAMILIES.index((name, kind)) % len(WAYS)]))


def positional(function, inputs):
    """`inputs` by position, in the order of the signature and with its defaults, and what it does not name."""
    known = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    last = max(i for i, parameter in enumerate(known) if parameter.name in inputs)
    args = [inputs.get(parameter.name, parameter.default) for parameter in known[: last + 1]]
    return args, {key: value for key, value in inputs.items() if key not in {p.name for p in known}}


def cost(trace):
    """What a trace says, in numbers that can be compared."""
    return trace.tokens.tolist(), trace.kv_lengths.tolist(), trace.flops.actual, trace.kv_bytes.actual


@pytest.mark.filterwarnings("ignore:Both .* are set:FutureWarning")  # what was renamed gets its default as well
def test_positional_calls(name, kind):
    """By position or by name, with labels or without, through `__call__` or `forward`: one answer, one trace."""
    model, plain = patched(name, kind), clone(name)
    inputs = batch(registry()[name], plain, ((kind,), (kind, kind)), seed=3)
    labels = inputs["input_ids"].clone()
    with torch.no_grad():
        expected, kept = model(**inputs).logits, cost(mustdrop.trace(model))
        assert not torch.equal(expected, plain(**inputs).logits)
        loss = model(**inputs, labels=labels).loss
        assert cost(mustdrop.trace(model)) == kept  # labels decide nothing
        for call in (model, model.forward):
            args, rest = positional(model.forward, inputs)
            assert torch.equal(call(*args, **rest).logits, expected)
            assert cost(mustdrop.trace(model)) == kept
            args, rest = positional(model.forward, {**inputs, "labels": labels})
            assert torch.equal(call(*args, **rest).loss, loss)  # what was dropped has left it
        base = find(model).base(model)
        if base is not model:
            states = base(**inputs).last_hidden_state
            for call in (base, base.forward):
                args, rest = positional(base.forward, inputs)
                assert torch.equal(call(*args, **rest).last_hidden_state, states)
                assert cost(mustdrop.trace(model)) == kept
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    answer, kept = model.generate(**inputs, generation_config=config), cost(mustdrop.trace(model))
    ids = inputs.pop("input_ids")
    args, rest = positional(model.generate, {"inputs": ids, "generation_config": config})
    assert torch.equal(model.generate(*args, **inputs, **rest), answer)
    assert cost(mustdrop.trace(model)) == kept


def test_nested_calls(name, kind):
    """A forward and a generate inside a generate, and a forward inside a layer, give what they give alone."""
    model, adapter = patched(name, kind), registry()[name]
    outer = batch(adapter, model, ((kind,),), seed=4)
    inner = batch(adapter, model, ((kind, kind),), seed=5, first=1)
    options = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        logits = model(**inner).logits
    answer = model.generate(**inner, **options)
    expected, kept = model.generate(**outer, **options), cost(mustdrop.trace(model))
    layer, found = find(model).decoder_layers(model)[1], []

    def hooked(*_):
        handle.remove()
        found.append(model(**inner).logits)

    def criterion(ids, scores):
        found.append(model(**inner).logits)
        found.append(model.generate(**inner, **options))
        with pytest.raises(ValueError, match=r"\S"):
            model(**{key: value[..., :1] if key == "input_ids" else value for key, value in inner.items()})
        return torch.zeros(len(ids), dtype=torch.bool)

    handle = layer.register_forward_hook(hooked)
    again = model.generate(**outer, **options, stopping_criteria=StoppingCriteriaList([criterion]))
    assert torch.equal(again, expected)
    assert cost(mustdrop.trace(model)) == kept
    assert len(found) == 7
    assert all(torch.equal(made, logits if made.is_floating_point() else answer) for made in found)


def test_defaults_of_the_process(name, kind, default):
    """`torch.set_default_dtype`, `torch.set_default_device` and `with torch.device(...)` change no bit.

    The device "meta" stands in for one that is not the host: what lands there by default has no values.
    """
    plain, model = clone(name), patched(name, kind)
    inputs = batch(registry()[name], plain, ((kind,), (kind, kind)), seed=6)

    def answered(some):
        options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        return some.generate(**inputs, **options)

    def changed(some):
        with defaults(default):
            return answered(some)

    untouched = answered(plain)
    try:
        same = torch.equal(torch.stack(changed(plain).logits), torch.stack(untouched.logits))
    except Exception as error:
        pytest.skip(f"the unpatched model raises: {type(error).__name__}: {error}"[:150])
    expected, kept = answered(model), cost(mustdrop.trace(model))
    got = changed(model)
    assert torch.equal(got.sequences, expected.sequences)
    assert cost(mustdrop.trace(model)) == kept
    tolerance = 0 if same else 1e-5
    assert (torch.stack(got.logits) - torch.stack(expected.logits)).abs().max() <= tolerance
