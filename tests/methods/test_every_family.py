"""Every method on every family under every attention backend; nobody edits this file to add one."""

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


@pytest.mark.parametrize(("name", "kind", "method", "attention"), CASES, ids=map("-".join, CASES))
def test_dropping_equals_masking(name, kind, method, attention, flash):
    knobs = {"keep": share(method, name), **mustdrop.method.registry()[method].unmerged()}
    if "vision" in registry()[name].lacks and mustdrop.method.find(method, **knobs).vision is not None:
        with pytest.raises(UnsupportedModelError, match="no vision stage"):
            mustdrop.patch(clone(name), method, **knobs)
        return
    assert_dropping_equals_masking(name, ((kind,), (), (kind, kind)), attention, steps=3, method=method, **knobs)
