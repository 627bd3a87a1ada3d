"""`torch.compile(fullgraph=True)` of the language model of a patched model: a prompt's pass breaks no graph.

Each method with a number for a budget, on LLaVA; `test_family_compiles.py` has the other families. Another picture
takes the same graphs.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import mustdrop
from mustdrop import PrefillPruner
from support.builders import LLAMA, answer, batch, clone, vision_positions
from support.edges import BUDGETED
from support.masking_check import TOLERANCE
from support.passes import differences, left

#: Methods whose prompt's pass is not straight, and why.
NOT_STRAIGHT = {
    "h2o": "the cache is cut by what each layer has read",
    "snapkv": "likewise",
    "tgvkv": "likewise",
}
STRAIGHT = [name for name in BUDGETED if name not in NOT_STRAIGHT]
COMPARES = ("dart", "mustdrop+")  # hidden states, between decoder layers


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def in_place(model):
    model.model.language_model.compile(fullgraph=True, backend="eager")


@pytest.mark.parametrize(
    ("method", "knobs"), [*((name, {}) for name in STRAIGHT), *((name, {"geometry": "centered"}) for name in COMPARES)]
)
def test_every_method(method, knobs):
    model, inputs = mustdrop.patch(clone(LLAMA), method, keep=16, **knobs), batch(LLAMA, (1, 1))
    other = batch(LLAMA, (1, 1), seed=5)
    plainly = [left(model, given) for given in (inputs, other)]
    in_place(model)
    compiled = left(model, inputs)
    graphs = counters["stats"]["unique_graphs"]
    again = left(model, other)
    assert not differences(plainly[0], compiled)
    assert not differences(plainly[1], again)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("images", [(1, 1), (1, 2)], ids=str)
def test_words_that_score_and_clusters(images):
    """Which words score is told by their embeddings, inside the graph; what is dropped becomes a few means."""
    model = mustdrop.patch(clone(LLAMA), "sparsevlm", keep=0.5, layers=(0, 2), per_cluster=2)
    inputs = batch(LLAMA, images)
    plainly = left(model, inputs)
    in_place(model)
    assert not differences(plainly, left(model, inputs))
    assert not counters["graph_break"]


@pytest.mark.parametrize("method", ["mustdrop", "fastv"])
def test_padding_and_a_module_around_the_text_model(method):
    model, inputs = mustdrop.patch(clone(LLAMA), method, keep=0.4), batch(LLAMA, (1, 2))
    plainly = left(model, inputs)
    model.model.language_model = torch.compile(model.model.language_model, fullgraph=True, backend="eager")
    assert not differences(plainly, left(model, inputs))
    assert not counters["graph_break"]


def test_a_mask_of_the_callers_own():
    """Words that may not see the first half of a picture do not score it."""
    model = mustdrop.patch(clone(LLAMA), prefill=PrefillPruner(survivors=(12,), layers=(1,)))
    inputs = batch(LLAMA, (1,))
    where = vision_positions(inputs["input_ids"], 0)
    mask = torch.ones(inputs["input_ids"].shape[1], inputs["input_ids"].shape[1], dtype=torch.bool).tril()
    mask[where[-1] + 1 :, where[:18]] = False
    inputs["attention_mask"] = mask[None, None]
    plainly = left(model, inputs)
    in_place(model)
    assert not differences(plainly, left(model, inputs))
    assert not counters["graph_break"]


def test_other_shapes_are_other_graphs_and_right():
    model = mustdrop.patch(clone(LLAMA), "mustdrop", keep=16)
    given = [batch(LLAMA, (1,)), batch(LLAMA, (1, 1)), batch(LLAMA, (1,), after=(9,))]
    plainly = [left(model, inputs) for inputs in given]
    in_place(model)
    for inputs, expected in zip(given * 2, plainly * 2, strict=True):
        assert not differences(expected, left(model, inputs))


def test_a_compiled_text_model_generates():
    """Steps over a growing cache break the graph at the hooks, as they did; without `fullgraph` nobody minds."""
    model, inputs = mustdrop.patch(clone(LLAMA), "mustdrop", keep=16), batch(LLAMA, (1, 1))
    expected = answer(model, inputs, 3)
    model.model.language_model.compile(backend="eager")
    got = answer(model, inputs, 3)
    assert torch.equal(got.sequences, expected.sequences)
    assert (got.logits - expected.logits).abs().max() <= TOLERANCE
