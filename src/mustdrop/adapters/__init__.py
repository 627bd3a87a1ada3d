"""One file per model family. See docs/add-a-model.md."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import transformers

from mustdrop.adapters.base import Adapter
from mustdrop.adapters.unsupported import refusal
from mustdrop.compat import older_than
from mustdrop.errors import UnsupportedModelError


@cache
def registry() -> dict[str, Adapter]:
    """Name -> adapter of every module in this package; a module defines one final `Adapter` subclass or more."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Adapter) and value is not Adapter:
                adapter = value()
                found[adapter.name] = adapter
    return found


def list_adapters() -> tuple[str, ...]:
    """Names of the model families that `patch` knows, sorted."""
    return tuple(sorted(registry()))


adapters = list_adapters


def find(model: object) -> Adapter:
    """The adapter for `model`.

    Raises:
        UnsupportedModelError: no adapter, or not for this model; the message says why where that is known, what to pass
            in its place, and which supported classes have names like its own.
    """
    names = [kind.__name__ for kind in type(model).__mro__]
    for adapter in registry().values():
        if any(name in adapter.classes for name in names):
            if older_than(adapter.since):
                raise UnsupportedModelError(
                    f"{adapter.name} needs transformers >= {adapter.since}, found {transformers.__version__}: "
                    "pip install -U transformers."
                )
            adapter.check(model)
            return adapter
    raise UnsupportedModelError(refusal(model, [name for adapter in registry().values() for name in adapter.classes]))
