"""Small and thin media, and media of which a mask hides a part: nothing that the plain model runs is refused.

``--breadth`` says how much of the product of families and methods runs (see tests/methods/test_every_family).
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner, errors
from mustdrop.adapters import registry
from mustdrop.method import find
from mustdrop.method import registry as recipes
from support import families
from support.builders import answer
from support.edges import BUDGETED, share, skip_where_the_plain_model_fails, small_sizes, with_sizes
from support.families import (
    assert_dropping_equals_masking,
    batch,
    cast,
    clone,
    compare,
    double_throughout,
    fitting,
    in_double,
    plain,
    vision_positions,
)
from tests.families import fixture_of

FAMILIES = families.PAIRS
each = pytest.mark.parametrize(("name", "kind"), FAMILIES, ids=map("-".join, FAMILIES))


@pytest.fixture
def breadth(request):
    return request.config.getoption("--breadth")


def needs_the_vision_stage(name):
    if "vision" in registry()[name].lacks:
        pytest.skip("this family has no vision stage")


def chosen(name, kind, breadth):
    """The default method, and one in turn or all."""
    lacks = registry()[name].lacks
    fits = [m for m in BUDGETED if not any(getattr(find(m, keep=0.5), stage) is not None for stage in lacks)]
    if breadth != "turns":
        return fits
    turn = fits[(3 * FAMILIES.index((name, kind)) + 1) % len(fits)]
    return [m for m in dict.fromkeys(("mustdrop", turn)) if m in fits]


@each
def test_a_picture_smaller_than_a_window_is_not_merged(name, kind):
    needs_the_vision_stage(name)
    for vision in (VisionStagePruner(window=20), VisionStagePruner(window=2, temporal_window=9, threshold=1.0)):
        model = mustdrop.patch(clone(name), vision=vision)
        inputs = batch(registry()[name], model, ((kind,),))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.NothingDroppedWarning)
            ours = answer(model, inputs, 1)
        assert torch.equal(ours.logits, answer(plain(name), inputs, 1).logits)


@each
@pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")
@pytest.mark.filterwarnings("ignore::mustdrop.errors.BudgetWarning")
def test_small_and_thin_media_beside_a_usual_one(name, kind, breadth):
    """A batch is as good as its rows, and dropping equals masking in each."""
    adapter, sizes = registry()[name], small_sizes(name, kind)
    if not sizes:
        pytest.skip("all media of this family become equally many tokens")
    usual, rows = fixture_of(adapter).sizes(kind)[0], ((kind,), (kind,))
    methods = chosen(name, kind, breadth)
    pairs = itertools.product(sizes, methods)
    if breadth == "turns":
        pairs = zip((sizes[0], sizes[-1]), methods, strict=False)
    for size, method in pairs:
        inputs = batch(with_sizes(adapter, kind, (size, usual)), plain(name), rows)
        knobs = {"method": method, "keep": share(method, name), **recipes()[method].unmerged()}
        both = compare(name, rows, inputs=inputs, steps=1, **knobs)
        assert (both.ours.logits - both.oracle.logits).abs().max() <= 1e-5
        assert all(len(both.trace.kept(layer, 0)) for layer in range(len(both.trace.tokens) + 1))


@each
@pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")
def test_a_small_picture_beside_a_large_one_keeps_a_token(name, kind):
    """Its part of the budget is less than one; the tokens go round, so each medium of the prompt has one."""
    needs_the_vision_stage(name)
    adapter, sizes = registry()[name], small_sizes(name, kind)
    if not sizes:
        pytest.skip("all media of this family become equally many tokens")
    usual = fixture_of(adapter).sizes(kind)[0]
    inputs = batch(with_sizes(adapter, kind, (sizes[0], usual, sizes[0])), plain(name), ((kind,) * 3,))
    model = mustdrop.patch(clone(name), "random", keep=3)
    answer(model, inputs, 1)
    trace = mustdrop.trace(model)
    kept = trace.kept(0).tolist()
    assert len(kept) == 3
    assert all(set(medium.index.tolist()) & set(kept) for medium in trace.media[0])


@each
@pytest.mark.filterwarnings("ignore::mustdrop.errors.BudgetWarning")
def test_a_mask_may_hide_vision_tokens(name, kind):
    """As ablations and blind baselines do: the hidden tokens are not there, and nothing else changes."""
    adapter, model = registry()[name], plain(name)
    rows = ((kind,), (kind, kind))
    inputs = batch(adapter, model, rows)
    where = vision_positions(model, inputs["input_ids"], 1)
    inputs["attention_mask"][1, where[len(where) // 2 :]] = 0
    skip_where_the_plain_model_fails(name, inputs)
    theirs = answer(model, inputs, 1)
    assert torch.equal(answer(mustdrop.patch(clone(name), "none"), inputs, 1).logits, theirs.logits)
    stages = {
        "vision": VisionStagePruner(window=2, threshold=0.2, keep=0.8),
        "prefill": PrefillPruner(keep=0.6),
        "decode": DecodeCachePruner(),
    }
    if adapter.recurrent(model):  # their oracle sums a shorter sequence in other chunks, which float32 shows
        with double_throughout():
            double = cast(inputs, torch.float64)
            both = compare(name, rows, inputs=double, steps=2, change=in_double, **fitting(name, stages))
    else:
        both = compare(name, rows, inputs=inputs, steps=2, **fitting(name, stages))
    assert (both.ours.logits - both.oracle.logits).abs().max() <= (1e-8 if adapter.recurrent(model) else 1e-5)
    left = both.trace.kept(len(both.trace.tokens), 1)
    assert len(left) > 0
    assert left.max() < len(where) // 2


@pytest.mark.parametrize("method", BUDGETED)
def test_hidden_tokens_take_no_place_from_others(method):
    model = mustdrop.patch(clone("llava"), method, keep=share(method, "llava"))
    inputs = batch(registry()["llava"], model, (("image", "image"), ("image",)))
    where = vision_positions(model, inputs["input_ids"], 0)
    inputs["attention_mask"][0, where[36:]] = 0
    answer(model, inputs, 1)
    trace = mustdrop.trace(model)
    spent = getattr(trace, find(method).account)
    assert torch.all(spent <= share(method, "llava") * 36 + 1e-4)
    assert torch.all(spent > share(method, "llava") * 36 - 1 - 1e-4)


def tiny_and_usual(name="qwen2_vl", size=(3, 16, 16)):
    """One picture of 4 tokens and one of the usual size."""
    adapter = registry()[name]
    return batch(with_sizes(adapter, "image", (size, (3, 48, 48))), plain(name), (("image",), ("image",)))


@pytest.mark.parametrize("method", ["mustdrop", "random", "fastv", "snapkv", "mustdrop+", "pyramiddrop"])
def test_a_budget_beyond_a_picture_keeps_what_there_is(method):
    model, inputs = mustdrop.patch(clone("qwen2_vl"), method, keep=26), tiny_and_usual()
    answer(model, inputs, 2)
    trace = mustdrop.trace(model)
    assert trace.total.tolist() == [4, 36]
    assert getattr(trace, find(method).account)[0] == 4
    assert getattr(trace, find(method).account)[1] <= 26
    strict = mustdrop.patch(clone("qwen2_vl"), method, keep=26, strict=True)
    with pytest.raises(errors.BudgetError, match="26"):
        answer(strict, inputs, 1)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "dart", "sparsevlm"])
def test_a_batch_is_not_lost_for_a_prompt_whose_budget_the_filters_cannot_meet(method):
    """Of 36 tokens the layers before the first filter cost more than 5; the picture of 4 meets it."""
    model, inputs = mustdrop.patch(clone("qwen2_vl"), method, keep=5), tiny_and_usual()
    knobs = {"method": method, "keep": 5, **recipes()[method].unmerged()}
    with pytest.warns(errors.BudgetWarning, match="keep=5 of 36 vision tokens.*one stays behind each.*strict=True"):
        answer(model, inputs, 1)
    first = model.__dict__["_mustdrop"].filters[0]
    assert mustdrop.trace(model).tokens[:, 0].tolist() == [4] * 5
    assert mustdrop.trace(model).tokens[:, 1].tolist() == [36] * (first + 1) + [1] * (4 - first)
    with pytest.warns(errors.BudgetWarning):
        assert_dropping_equals_masking("qwen2_vl", (("image",), ("image",)), inputs=inputs, steps=2, **knobs)
    alone = batch(registry()["qwen2_vl"], model, (("image",), ()))
    with pytest.raises(errors.BudgetError, match="impossible with 16"):  # no prompt with a picture meets it
        answer(model, alone, 1)
    with pytest.raises(errors.BudgetError, match=r"impossible with 36|more than the 4"):
        answer(mustdrop.patch(model, method, keep=5, strict=True), inputs, 1)


def test_the_same_budgets_composed():
    pruners = {
        "vision": VisionStagePruner(window=3, keep=torch.tensor(30)),
        "prefill": PrefillPruner(keep=26),
        "decode": DecodeCachePruner(keep=16, interval=1),
    }
    model, inputs = mustdrop.patch(clone("qwen2_vl"), **pruners), tiny_and_usual()
    answer(model, inputs, 4)
    assert mustdrop.trace(model).kv_vision[:, 0].tolist() == [4] * 5
    with mustdrop.patched(model, strict=True, **pruners), pytest.raises(errors.BudgetError, match="4 vision tokens"):
        answer(model, inputs, 1)
    answer(model, inputs, 1)


@pytest.mark.parametrize("method", ["mustdrop", "random", "tome", "visionzip", "snapkv"])
def test_a_third_of_two_tokens_is_one_and_says_so_once(method):
    model, inputs = mustdrop.patch(clone("qwen2_vl"), method, keep=1 / 3), tiny_and_usual(size=(3, 8, 16))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        answer(model, inputs, 1)
        answer(model, inputs, 1)
    told = [w for w in seen if issubclass(w.category, errors.BudgetWarning)]
    assert len(told) == (0 if find(method).account == "equal_entries" else 1)
    assert getattr(mustdrop.trace(model), find(method).account)[0] == 1


def test_strict_refuses_a_share_below_one_token_and_a_picture_below_a_window():
    inputs = tiny_and_usual(size=(3, 8, 16))
    for model, error in (
        (mustdrop.patch(clone("qwen2_vl"), strict=True), errors.BudgetError),
        (
            mustdrop.patch(clone("qwen2_vl"), mustdrop.method.find("mustdrop", keep=1.0, strict=True)),
            errors.ConfigError,
        ),
    ):
        with pytest.raises(error, match=r"less than one token|smaller than one window"):
            answer(model, inputs, 1)
    answer(mustdrop.patch(clone("qwen2_vl"), keep=1.0), inputs, 1)


def test_a_share_that_large_pictures_meet_is_met_as_nearly_as_can_be_by_small_ones():
    """Of two tokens the layer before the filter takes both, and one stays behind it."""
    inputs = tiny_and_usual(size=(3, 8, 16))
    model = mustdrop.patch(clone("qwen2_vl"), "fastv", keep=0.45, layer=1)
    with pytest.warns(errors.BudgetWarning, match="0.45 of 2 vision tokens"):
        answer(model, inputs, 1)
    assert mustdrop.trace(model).tokens[:, 0].tolist() == [2, 1, 1, 1, 1]
    with pytest.raises(errors.BudgetError, match="less than one token"):
        answer(mustdrop.patch(model, "fastv", keep=0.45, layer=1, strict=True), inputs, 1)
