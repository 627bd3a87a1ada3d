"""Every method on every family under every attention backend; nobody edits this file to add one of them.

How much of the product runs is a matter of time, and ``--breadth`` says it:

* ``turns`` (the default tests): every second pair of family and method, under one backend, in one further test, and
  every fourth pair in the comparison with the masked reference. Backends and tests take turns over both.
* ``more`` (`nox -s backends`): what the turns leave out of the comparison with the masked reference under every
  backend, and of every second other test, in turn, under one backend.
* ``product`` (`nox -s product`): every test for every pair under every backend.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import mustdrop
import mustdrop.method
from mustdrop.adapters import registry
from mustdrop.errors import UnsupportedModelError
from support import attribution, conversations, fake_flash, families
from support.builders import answer
from support.edges import BUDGETED, refusal, share
from support.families import assert_dropping_equals_masking, batch, clone

FAMILIES = families.PAIRS
BACKENDS = ("sdpa", "eager", fake_flash.NAME)


@dataclass(frozen=True)
class Case:
    """One family with one kind of media, one method, one attention backend."""

    name: str
    kind: str
    method: str
    attention: str

    def __str__(self) -> str:
        return f"{self.name}-{self.kind}-{self.method}-{self.attention}"

    @property
    def rows(self) -> tuple[families.Row, ...]:
        """One medium, none, two: rows of different lengths and kept counts."""
        return ((self.kind,), (), (self.kind, self.kind))

    @property
    def turn(self) -> int:
        """What its backend and its test are chosen by where these take conversations."""
        return FAMILIES.index((self.name, self.kind)) + BUDGETED.index(self.method)

    @property
    def refusal(self) -> str:
        """What the error says where the family lacks what the method needs; empty if it lacks nothing."""
        return refusal(self.method, self.name)

    @property
    def why(self) -> str:
        """The reason that the adapter gives."""
        adapter = registry()[self.name]
        if self.refusal == "resizes pictures":
            return f"pictures cannot be resized, because {adapter.fixed_pictures}"
        return f"the family has {self.refusal}, because {adapter.lacks[self.refusal.split()[1]]}"

    @property
    def knobs(self) -> dict[str, Any]:
        """The method in its own form, as far as the attention backend can express it."""
        unbiased = mustdrop.method.registry()[self.method].unbiased() if self.attention == fake_flash.NAME else {}
        return {"method": self.method, "keep": share(self.method, self.name), **unbiased}

    @property
    def maskable(self) -> dict[str, Any]:
        """As :attr:`knobs`, in the form that a mask can imitate."""
        return self.knobs | mustdrop.method.registry()[self.method].unmerged()

    def unpatched(self) -> Any:
        """An independent unpatched model that runs this backend."""
        if self.attention == fake_flash.NAME:
            return fake_flash.use(clone(self.name))
        return clone(self.name, self.attention)

    def patched(self, **knobs: Any) -> Any:
        """An independent model, patched with :attr:`knobs` and what else is given."""
        return mustdrop.patch(self.unpatched(), **self.knobs | knobs)


POSSIBLE = [
    Case(name, kind, method, attention)
    for name, kind in FAMILIES
    for method in BUDGETED
    for attention in BACKENDS
    if not (attention == fake_flash.NAME and registry()[name].refuses_flash)
]
CASES = [case for case in POSSIBLE if not case.refusal]
REFUSED = [case for case in POSSIBLE if case.refusal]
#: Tests besides the comparison with the masked reference, in the order in which they take conversations.
FURTHER = (
    "test_keep_all_is_bit_identical",
    "test_padded_row_equals_single_row",
    "test_cache_really_shrinks",
    "test_trace_names_the_right_patches",
    "test_beams",
    "test_sampling",
    "test_second_turn",
    "test_unpatch_restores",
)


@functools.cache
def backends_of(name):
    return [
        attention for attention in BACKENDS if not (attention == fake_flash.NAME and registry()[name].refuses_flash)
    ]


def runs(case, test, breadth):
    """Whether a test runs for a case."""
    known = backends_of(case.name)
    its_backend = case.attention == known[case.turn % len(known)]
    turn = case.turn // len(known)
    apart = (FURTHER.index(test) - turn) % len(FURTHER) if test in FURTHER else 0
    # the comparison with the masked reference is most of the time: `backends` has the rest
    due = apart == 0 and turn // len(FURTHER) % 2 == 0 if test in FURTHER else turn % 4 == 0
    in_turn = its_backend and due
    if breadth == "more":
        return not in_turn and (test not in FURTHER or (its_backend and apart % 2 == 0))
    return breadth == "product" or in_turn


def pytest_generate_tests(metafunc):
    test = metafunc.function.__name__
    of = REFUSED if test == "test_what_is_missing_is_refused" else CASES
    chosen = [case for case in of if runs(case, test, metafunc.config.getoption("--breadth"))]
    metafunc.parametrize("case", chosen, ids=map(str, chosen))


@functools.lru_cache(maxsize=8)
def unpruned(name, kind, attention, rows, cache=False):
    """What the unpatched model answers."""
    model = Case(name, kind, BUDGETED[0], attention).unpatched()
    options = {"past_key_values": families.new_cache(model)} if cache else {}
    return answer(model, batch(registry()[name], model, rows), 2, **options)


def test_what_is_missing_is_refused(case, flash, record_property):
    record_property("refused", f"refused: {case.why}")
    with pytest.raises(UnsupportedModelError, match=case.refusal):
        case.patched()


def test_dropping_equals_masking(case, flash):
    """At the prefill and over 8 decode steps."""
    assert_dropping_equals_masking(case.name, case.rows, case.attention, steps=8, **case.maskable)


@pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")
def test_keep_all_is_bit_identical(case, flash):
    model = case.patched(keep=1.0)
    ours = answer(model, batch(registry()[case.name], model, case.rows), 2)
    theirs = unpruned(case.name, case.kind, case.attention, case.rows)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.sequences, theirs.sequences)


def test_padded_row_equals_single_row(case, flash):
    model, adapter = case.patched(), registry()[case.name]
    together = answer(model, batch(adapter, model, case.rows), 2)
    kept = mustdrop.trace(model)
    assert kept.dropped_anything
    for r, row in enumerate(case.rows):
        alone = answer(model, batch(adapter, model, (row,), first=r), 2)
        trace = mustdrop.trace(model)
        same = all(torch.equal(trace.kept(layer), kept.kept(layer, r)) for layer in range(len(kept.tokens) + 1))
        if not same and families.counts_padding(case.name, case.kind):
            pytest.skip("the unpatched model counts padding as positions, on which what this method reads depends")
        assert same
        assert (alone.logits[0] - together.logits[r]).abs().max() <= 1e-5


def test_cache_really_shrinks(case, flash):
    model = case.patched()
    cache = answer(model, batch(registry()[case.name], model, ((case.kind,),)), 2).cache
    trace, whole = mustdrop.trace(model), unpruned(case.name, case.kind, case.attention, ((case.kind,),), cache=True)
    for layer, own, full in zip(trace.kv_lengths[:, 0].tolist(), cache.layers, whole.cache.layers, strict=False):
        if own.keys is None:  # a recurrent layer
            continue
        assert own.keys.shape[2] == layer
        assert own.keys.untyped_storage().nbytes() * full.keys.shape[2] == full.keys.nbytes * layer
        assert own.values.untyped_storage().nbytes() * full.values.shape[2] == full.values.nbytes * layer
    assert trace.kv_bytes.actual < trace.kv_bytes.unpruned


def test_trace_names_the_right_patches(case, flash):
    """Paint what a token shows and follow it through the encoder and through every decoder layer."""
    adapter, model, oracle = registry()[case.name], case.unpatched(), case.unpatched()
    for either in (model, oracle):
        if "vision" not in adapter.lacks:
            tower = adapter.tower(either, case.kind)
            attribution.hush((*tower.before, *tower.blocks))
        attribution.hush(adapter.decoder_layers(either))
    mustdrop.patch(model, **case.maskable)
    attribution.follow_through_the_layers(adapter, model, oracle, case.kind)


def test_beams(case, flash):
    options = {"num_beams": 3, "num_return_sequences": 2}
    expanded(case, options)


def test_sampling(case, flash):
    options = {"do_sample": True, "num_return_sequences": 2, "temperature": 0.8}
    expanded(case, options)


def expanded(case, options):
    """Several answers per prompt, those of the masked reference."""
    families.skip_where_transformers_fails(case.name, case.kind, **options)
    rows = families.for_beams(case.name, case.kind)
    assert_dropping_equals_masking(case.name, rows, case.attention, steps=4, generation=options, **case.maskable)


def test_second_turn(case, flash):
    """The conversation goes on over the pruned cache."""
    conversations.skip_where_backends_differ(case.name, case.kind, case.unpatched)
    both = conversations.compare_two_turns(case.name, case.kind, case.attention, **case.maskable)
    assert both.hidden.anything
    assert (both.ours.logits - both.oracle.logits).abs().max() <= 1e-5
    assert torch.equal(both.ours.sequences, both.oracle.sequences)


def test_unpatch_restores(case, flash):
    model = case.unpatched()
    inputs = batch(registry()[case.name], model, case.rows)
    answer(model, inputs, 2)  # transformers itself leaves things behind at the first run
    before = families.lasting(model, lambda: answer(model, inputs, 2))
    answer(mustdrop.patch(model, **case.knobs), inputs, 2)
    mustdrop.unpatch(model)
    assert families.lasting(model) == before
    assert torch.equal(
        answer(model, inputs, 2).logits, unpruned(case.name, case.kind, case.attention, case.rows).logits
    )
