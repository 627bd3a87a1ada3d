"""The time of the method apart from the model's: everything of ours is clocked, and nothing of it stays."""

from __future__ import annotations

import copy
import gc
import itertools
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mustdrop
from mustdrop import Method, PrefillPruner, Selection, VisionStagePruner, errors, method_time
from mustdrop.method_time import timed
from mustdrop.pruners import VisionRule
from support.builders import answer, batch, clone, plain
from tests.families import build, fixture_of, inputs_of

PACKAGE = str(Path(mustdrop.__file__).parent)
# their first filter follows too late a layer of so shallow a model for the default budget
DEEP = {"dart": 0.6, "fastv": 0.6, "pyramiddrop": 0.8, "sparsevlm": 0.8, "flashvid": 0.6, "vscan": 0.6}
# one needs a trained scorer, the other packed patches; their ways are those of divprune and of mustdrop
APART = {"learned", "pixelprune"}
STORING = "kv/growing.py _copy"  # in place of the cache of transformers, which stores as well


class Hand:
    """A clock that goes where it is pushed."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def push(self, seconds):
        self.now += seconds


def first_token(model):
    return answer(model, batch(), steps=0)


def everything(model):
    """What patching has put in, as it stands now."""
    installation = method_time._runtime(model).installation
    return [
        *(handle.hooks_dict_ref()[handle.id] for handle in installation.handles),
        *(vars(module.config)["capture"] for module in installation.tapped),
        *(thing for _, _, wrapper, _ in installation.overridden for thing in (type(wrapper), wrapper.function)),
    ]


class Slow(VisionRule):
    """Takes three seconds by a clock of its own."""

    def choose(self, seen, count):
        if hand.now > 1000:
            raise RuntimeError("a rule that fails")
        hand.push(3)
        return Selection.picked(torch.arange(count).expand(len(seen.values), -1))


hand = Hand()


@pytest.fixture
def slow():
    """A model whose rule takes 3 seconds per view, its tower 10, each decoder layer's feed-forward part 1."""
    hand.now = 0.0
    model = clone()
    rule = Method(vision=VisionStagePruner(window=None, key_share=0, keep=0.5, score=Slow()))
    mustdrop.patch(model, rule)
    model.model.vision_tower.register_forward_pre_hook(lambda *_: hand.push(10))
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: hand.push(1))
    return model


def test_each_second_is_told_to_whom_it_belongs(slow):
    first_token(slow)  # the warm-up
    before = hand.now
    with timed(slow, hand) as spent:
        hand.push(0.5)  # outside of any call it is not the method's
        first_token(slow)
    assert spent.method == 3
    assert spent.model == 10 + len(slow.model.language_model.layers) + 0.5
    assert spent.whole == hand.now - before
    assert spent.share == spent.method / spent.whole


def test_the_parts_add_up_to_the_whole():
    """By a clock that goes on with each look: no moment is lost, and none counts twice."""
    looks = itertools.count()
    model = clone()
    with mustdrop.patched(model, "mustdrop"):
        first_token(model)
        with timed(model, lambda: float(next(looks))) as spent:
            first_token(model)
    assert spent.whole == next(looks) - 1
    assert spent.method > 0
    assert spent.model > 0


class Owners(TorchDispatchMode):
    """Operations that the code of one asks for while the clock runs for the other.

    What the method has a scorer's norm or the embeddings of the model compute for it is the method's own.
    """

    def __init__(self, model, watch):
        super().__init__()
        self.watch, self.seen, self.wrong = watch, Counter(), set()
        text = method_time._runtime(model).text
        self.lent = (text.norm, text.get_input_embeddings())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        frame, ours = sys._getframe(1), None
        while frame is not None and ours is None:
            name = frame.f_code.co_filename
            if name.startswith(PACKAGE) and name != method_time.__file__:
                ours, place = True, f"{Path(name).relative_to(PACKAGE).as_posix()} {frame.f_code.co_name}"
            elif "/transformers/" in name and not any(frame.f_locals.get("self") is module for module in self.lent):
                ours, place = False, f"{Path(name).name} {frame.f_code.co_name}"
            frame = frame.f_back
        if ours is not None:
            self.seen[ours] += 1
            if ours is not self.watch.in_method:
                self.wrong.add(place)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def watches(monkeypatch):
    found = []
    start = method_time._Watch.start
    monkeypatch.setattr(method_time._Watch, "start", lambda watch: (found.append(watch), start(watch))[1])
    return found


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *itertools.product(("llava", "qwen2_5_vl"), sorted({*mustdrop.list_methods()} - APART)),
        ("qwen3_vl", "mustdrop+"),  # its text model adds to vision tokens between layers
    ],
)
def test_whatever_runs_for_a_method_is_clocked_for_it(family, method, watches):
    """Every operation that code of this package asks for runs in the method's time, and the model's in the model's.

    But for the cache's storing of what a layer gives it, which a cache without mustdrop does as well.
    """
    model = build(family)
    (size, *_) = fixture_of(family).sizes("image")
    picture = torch.rand(*size, generator=torch.Generator().manual_seed(0))
    inputs = inputs_of(family, model, "image", [picture])
    knobs = {"keep": DEEP[method]} if method in DEEP else {}
    with mustdrop.patched(model, method, **knobs), timed(model), Owners(model, watches[-1]) as owners:
        answer(model, inputs, steps=2)
    assert owners.seen[True]
    assert owners.seen[False]
    assert owners.wrong <= {STORING}


def test_a_measured_call_answers_as_an_unmeasured_one_and_leaves_nothing():
    model = clone()
    with mustdrop.patched(model, "mustdrop+"):
        usual, before = first_token(model), everything(model)
        with timed(model):
            assert all(a is not b for a, b in zip(everything(model), before, strict=True))
            measured = first_token(model)
            trace = mustdrop.trace(model)
        after = everything(model)
        assert all(a is b or a == b for a, b in zip(after, before, strict=True))
        assert torch.equal(measured.logits, usual.logits)
        assert trace.to_dict() == mustdrop.trace(model).to_dict()
    assert torch.equal(first_token(model).logits, first_token(plain()).logits)


def test_an_exception_inside_leaves_the_model_as_it_was(slow):
    usual, before = first_token(slow), everything(slow)
    hand.push(5000)
    with pytest.raises(RuntimeError, match="a rule that fails"), timed(slow, hand) as spent:
        first_token(slow)
    assert spent.whole == spent.model == 10  # it went through the tower, and no further
    hand.now = 0.0
    assert all(a is b or a == b for a, b in zip(everything(slow), before, strict=True))
    assert torch.equal(first_token(slow).logits, usual.logits)
    with timed(slow, hand) as again:
        first_token(slow)
    assert again.method == 3


def test_unpatching_inside_takes_all_of_it_out():
    model = clone()
    mustdrop.patch(model, "mustdrop")
    with timed(model):
        first_token(model)
        mustdrop.unpatch(model)
        assert torch.equal(first_token(model).logits, first_token(plain()).logits)
    assert not hasattr(model, "_mustdrop")
    assert "generate" not in vars(model)
    assert torch.equal(first_token(model).logits, first_token(plain()).logits)


def test_a_copy_of_a_patched_model_is_measured_by_itself(slow):
    other = copy.deepcopy(slow)
    with timed(other, hand) as spent:
        first_token(slow)
    assert spent.method == 0
    with timed(other, hand) as spent:
        first_token(other)
    assert spent.method == 3


def test_nothing_holds_a_model_that_was_measured():
    """What is remembered of a method's parameters is remembered by its function."""
    model = clone()
    with mustdrop.patched(model, "divprune"), timed(model):
        first_token(model)
    gone = weakref.ref(model.model)
    del model
    gc.collect()
    assert gone() is None


def test_calls_of_other_threads_are_not_counted(slow):
    with timed(slow, hand) as spent:
        other = threading.Thread(target=first_token, args=(slow,))
        other.start()
        other.join()
    assert spent.method == 0


def test_what_cannot_be_measured_says_why():
    model = clone()
    with pytest.raises(errors.NotPatchedError, match=r"call mustdrop\.patch"), timed(model):
        pass
    mustdrop.patch(model, "divprune")
    with timed(model), pytest.raises(errors.ConfigError, match="being measured already"), timed(model):
        pass
    mustdrop.compile(model, backend="eager")
    with pytest.raises(errors.ConfigError, match="graphs=0"), timed(model):
        pass
    mustdrop.compile(model, graphs=0)
    model.model.language_model.compile(backend="eager")
    with pytest.raises(errors.ConfigError, match="runs no clock"), timed(model):
        pass


def test_without_a_clock_it_waits_for_the_device(monkeypatch):
    asked = []
    monkeypatch.setattr(method_time, "now", lambda device: asked.append(device) or float(len(asked)))
    model = clone()
    with mustdrop.patched(model, prefill=PrefillPruner(keep=0.5)), timed(model) as spent:
        first_token(model)
    assert set(asked) == {torch.device("cpu")}
    assert spent.whole == len(asked) - 1
