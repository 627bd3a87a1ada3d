"""`torch.compile(fullgraph=True)` of the language model, for every family whose untouched text model compiles.

The default tests take a few families, `--breadth more` and `--support` all of them.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import mustdrop
from mustdrop.adapters import registry
from support import families
from support.edges import share
from support.masking_check import TOLERANCE
from support.passes import differences, left

FAMILIES = families.PAIRS
#: Of the default tests: full attention, packed patches, layers with a window, layers that keep a state.
SOME = [("llava", "image"), ("qwen2_5_vl", "image"), ("gemma3", "image"), ("lfm2_vl", "image")]


def pytest_generate_tests(metafunc):
    config = metafunc.config
    every = config.getoption("--breadth") != "turns" or config.getoption("--support", default=None) is not None
    chosen = FAMILIES if every else SOME
    metafunc.parametrize(("name", "kind"), chosen, ids=map("-".join, chosen))


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def method_of(name):
    """A method with a number for a budget that the family has the stages for."""
    lacks = registry()[name].lacks
    return "mustdrop" if not lacks else "fastv" if "prefill" not in lacks else "divprune"


def test_compiled_language_model(name, kind, record_property):
    """Where the untouched text model compiles, so does the patched one's pass of a prompt."""
    adapter, model = registry()[name], families.clone(name)
    inputs = families.batch(adapter, model, ((kind,), (kind,)))
    text = adapter.text(model)
    text.compile(fullgraph=True, backend="eager")
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # whatever torch or transformers cannot do
        why = f"the untouched text model does not compile: {type(error).__name__}"
        record_property("refused", why)
        pytest.skip(why)
    text._compiled_call_impl = None
    method = method_of(name)
    mustdrop.patch(model, method, keep=share(method, name))
    expected = left(model, inputs)
    torch.compiler.reset()
    counters.clear()
    text.compile(fullgraph=True, backend="eager")
    got = left(model, inputs)
    graphs = counters["stats"]["unique_graphs"]
    assert not differences(expected, got, TOLERANCE)
    left(model, families.batch(adapter, model, ((kind,), (kind,)), seed=3))
    assert counters["stats"]["unique_graphs"] == graphs
