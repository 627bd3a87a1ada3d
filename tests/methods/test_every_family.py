"""Every method on every family; nobody edits this file to add one.

The default run takes the attention backends in turn, so that each meets every family and every method; with
`--every-backend` (`nox -s backends`) each method runs on each family under each of them.
"""

from __future__ import annotations

import pytest

import mustdrop.method
from mustdrop.adapters import registry
from mustdrop.errors import UnsupportedModelError
from support import fake_flash
from support.families import assert_dropping_equals_masking, clone

from .test_every_method import BUDGETED, share

FAMILIES = [(name, kind) for name, adapter in registry().items() if adapter.available() for kind in adapter.media]
BACKENDS = ("sdpa", "eager", fake_flash.NAME)
CASES = [
    (name, kind, method, attention)
    for name, kind in FAMILIES
    for method in BUDGETED
    for attention in BACKENDS
    if not (attention == fake_flash.NAME and registry()[name].refuses_flash)
]


def its_turn(name, kind, method, attention):
    """Whether a case is in the default run."""
    known = [case[3] for case in CASES if case[:3] == (name, kind, method)]
    return attention == known[(FAMILIES.index((name, kind)) + BUDGETED.index(method)) % len(known)]


def pytest_generate_tests(metafunc):
    every = metafunc.config.getoption("--every-backend")
    chosen = [case for case in CASES if every or its_turn(*case)]
    metafunc.parametrize(("name", "kind", "method", "attention"), chosen, ids=map("-".join, chosen))


def test_dropping_equals_masking(name, kind, method, attention, flash):
    recipe = mustdrop.method.registry()[method]
    knobs = {"keep": share(method, name), **recipe.unmerged()}
    if attention == fake_flash.NAME:
        knobs |= recipe.unbiased()
    if "vision" in registry()[name].lacks and mustdrop.method.find(method, **knobs).vision is not None:
        with pytest.raises(UnsupportedModelError, match="no vision stage"):
            mustdrop.patch(clone(name), method, **knobs)
        return
    assert_dropping_equals_masking(name, ((kind,), (), (kind, kind)), attention, steps=8, method=method, **knobs)
