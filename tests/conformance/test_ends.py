"""Prompts that end with media: the last vision token predicts what follows, and stays, whatever rule chooses.

Every family meets every method; ``--breadth`` says how much of the product runs (see tests/methods/test_every_family).
"""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import registry
from mustdrop.method import registry as recipes
from support import families
from support.edges import (
    BUDGETED,
    cut_behind_media,
    ends_with_media,
    refusal,
    share,
    skip_where_the_plain_model_fails,
)
from support.families import assert_dropping_equals_masking, batch, clone, compare, plain

FAMILIES = families.PAIRS
PAIRS = [(name, kind, method) for name, kind in FAMILIES for method in BUDGETED if not refusal(method, name)]


def pytest_generate_tests(metafunc):
    if "method" not in metafunc.fixturenames or "name" not in metafunc.fixturenames:
        return
    every = metafunc.config.getoption("--breadth") != "turns"
    chosen = [pair for pair in PAIRS if every or in_turn(*pair)]
    metafunc.parametrize(("name", "kind", "method"), chosen, ids=map("-".join, chosen))


def in_turn(name, kind, method):
    """Each family meets one method, and each method some families."""
    fits = [pair[2] for pair in PAIRS if pair[:2] == (name, kind)]
    return method == fits[FAMILIES.index((name, kind)) % len(fits)]


@pytest.fixture
def breadth(request):
    return request.config.getoption("--breadth")


def assert_the_end_stays(name, inputs, both):
    ends = ends_with_media(plain(name), inputs)
    assert ends.any()
    for row in ends.nonzero()[:, 0].tolist():
        for layer in range(len(both.trace.tokens) + 1):
            assert both.trace.kept(layer, row)[-1] == both.trace.total[row] - 1
        assert both.ours.logits[row, 0].abs().max() > 0


def test_dropping_equals_masking(name, kind, method):
    """One prompt that ends with media, and a batch of which two end with media and two do not."""
    knobs = {"method": method, "keep": share(method, name), **recipes()[method].unmerged()}
    adapter, model = registry()[name], plain(name)
    for rows, ending in (((((kind,),)), (0,)), (((kind,), (), (kind, kind), (kind,)), (0, 2))):
        inputs = cut_behind_media(model, batch(adapter, model, rows), ending)
        skip_where_the_plain_model_fails(name, inputs)
        both = assert_dropping_equals_masking(name, rows, inputs=inputs, steps=3, **knobs)
        assert_the_end_stays(name, inputs, both)


@pytest.mark.parametrize(("name", "kind"), FAMILIES, ids=map("-".join, FAMILIES))
def test_the_smallest_budget_is_the_end(name, kind, breadth):
    """One token enters: the one that predicts, whichever of the media it belongs to."""
    adapter, model = registry()[name], plain(name)
    if "vision" in adapter.lacks:
        pytest.skip("this family has no vision stage")
    rows = ((kind, kind), (kind,))
    inputs = cut_behind_media(model, batch(adapter, model, rows), (0, 1))
    skip_where_the_plain_model_fails(name, inputs)
    for score in ("random",) if breadth == "turns" else ("random", "attention", "uniform"):
        both = compare(name, rows, inputs=inputs, steps=2, vision=VisionStagePruner(window=None, keep=1, score=score))
        assert (both.ours.logits - both.oracle.logits).abs().max() <= 1e-5
        assert_the_end_stays(name, inputs, both)
        assert both.trace.tokens[0].tolist() == [1, 1]


TWO_KINDS = [name for name, adapter in families.AVAILABLE.items() if len(adapter.media) > 1]


@pytest.mark.parametrize("name", TWO_KINDS)
@pytest.mark.parametrize("keep", [1, 2, 0.3])
def test_the_end_has_its_part_of_the_budget_of_two_kinds(name, keep, breadth):
    adapter, model = registry()[name], plain(name)
    if len({field for _, _, field in adapter.media.values()}) < len(adapter.media):
        pytest.skip("kinds that share a placeholder token cannot be told apart: transformers takes one per prompt")
    kinds = tuple(adapter.media)
    if breadth == "turns" and (TWO_KINDS.index(name) + (1, 2, 0.3).index(keep)) % 3:
        pytest.skip("budgets take turns: see --breadth")
    for row in (kinds, kinds[::-1], (*kinds, kinds[0])):
        rows = (row, (kinds[0],))
        inputs = cut_behind_media(model, batch(adapter, model, rows), (0,))
        skip_where_the_plain_model_fails(name, inputs)
        for vision in (VisionStagePruner(window=None, keep=keep), VisionStagePruner(window=2, threshold=-1, keep=keep)):
            both = compare(name, rows, inputs=inputs, steps=2, vision=vision)
            assert (both.ours.logits - both.oracle.logits).abs().max() <= 1e-5
            assert_the_end_stays(name, inputs, both)
            limit = keep if isinstance(keep, int) else keep * both.trace.total
            assert torch.all(both.trace.tokens[0] <= limit)


class Newest(PrefillPruner):
    """A pruner of somebody's own that knows nothing of protected tokens: it keeps the first ones."""

    def __call__(self, attention, alive=None, *, count=None, protected=None, importance=None):
        place = alive.cumsum(1)
        return mustdrop.Selection.from_mask(alive & (place <= count[:, None]))


@pytest.mark.parametrize(("name", "kind"), [("llava", "image"), ("llava_next", "image"), ("qwen2_vl", "video")])
def test_a_pruner_of_somebodys_own_cannot_drop_it(name, kind):
    adapter, model = registry()[name], plain(name)
    rows = ((kind,), (kind,))
    inputs = cut_behind_media(model, batch(adapter, model, rows), (1,))
    both = assert_dropping_equals_masking(
        name, rows, inputs=inputs, steps=3, prefill=Newest(keep=0.6), decode=DecodeCachePruner()
    )
    assert_the_end_stays(name, inputs, both)
    assert torch.all(both.trace.equal_tokens <= 0.6 * both.trace.total + 1e-4)


def test_a_padded_row_equals_the_row_alone():
    adapter, model = registry()["llava_next"], mustdrop.patch(clone("llava_next"), keep=2)
    whole = cut_behind_media(model, batch(adapter, model, (("image",), ("image",))), (0, 1))
    with torch.no_grad():
        together = model(**whole).logits[:, -1]
        kept = mustdrop.trace(model)
        for row in range(2):
            one = cut_behind_media(model, batch(adapter, model, (("image",),), first=row), (0,))
            assert (model(**one).logits[0, -1] - together[row]).abs().max() <= 1e-5
            assert torch.equal(mustdrop.trace(model).kept(0), kept.kept(0, row))
