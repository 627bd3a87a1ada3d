"""What every registered method must pass. Nobody edits this file to add a method."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.adapters import registry
from mustdrop.errors import UnknownKnobError
from mustdrop.method import find
from mustdrop.method import registry as recipes
from support.builders import answer
from support.edges import BUDGETED, share
from support.families import assert_dropping_equals_masking, batch, clone, plain

FAMILIES = [("llava", "image"), ("qwen2_5_vl", "image"), ("llava_onevision", "video")]
each = pytest.mark.parametrize("method", BUDGETED)
where = pytest.mark.parametrize(("family", "kind"), FAMILIES, ids=map("-".join, FAMILIES))


def assert_the_budget_is_met(method, trace, keep):
    """Whatever the budget of the method counts: tokens that layers process, or entries that the cache holds."""
    spent, total = getattr(trace, find(method).account), trace.total.float()
    assert torch.all(spent <= keep * total + 1e-4)
    assert torch.all(spent > keep * total - 1 - 1e-4)


@each
@where
def test_dropping_equals_masking_and_the_budget_is_met(method, family, kind):
    keep = share(method, family)
    for rows in (((kind,),), ((kind,), (), (kind, kind))):
        both = assert_dropping_equals_masking(family, rows, method=method, keep=keep, **recipes()[method].unmerged())
        assert_the_budget_is_met(method, both.trace, keep)


@each
@where
def test_the_default_form_meets_the_budget(method, family, kind):
    keep, model = share(method, family), clone(family)
    mustdrop.patch(model, method, keep=keep)
    answer(model, batch(registry()[family], model, ((kind,), (kind, kind))), steps=3)
    assert_the_budget_is_met(method, mustdrop.trace(model), keep)


@each
@where
@pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")
def test_keeping_everything_changes_no_bit(method, family, kind):
    model = mustdrop.patch(clone(family), method, keep=1.0)
    inputs = batch(registry()[family], model, ((kind,), (kind, kind)))
    assert torch.equal(answer(model, inputs, steps=3).logits, answer(plain(family), inputs, steps=3).logits)


@each
@where
def test_a_padded_row_is_the_row_alone(method, family, kind):
    model = mustdrop.patch(clone(family), method, keep=share(method, family))
    adapter = registry()[family]
    together = answer(model, batch(adapter, model, ((kind,), (kind, kind))), steps=3)
    kept = [mustdrop.trace(model).kept(layer, 0).tolist() for layer in range(mustdrop.trace(model).tokens.shape[0])]
    alone = answer(model, batch(adapter, model, ((kind,),)), steps=3)
    assert kept == [mustdrop.trace(model).kept(layer, 0).tolist() for layer in range(len(kept))]
    assert (together.logits[0] - alone.logits[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("method", mustdrop.methods())
def test_unknown_knobs_are_refused(method):
    with pytest.raises(UnknownKnobError, match="no_such_knob"):
        mustdrop.patch(clone("llava"), method, no_such_knob=1)
