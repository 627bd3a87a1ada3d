"""One module per benchmark, or per family of benchmarks; every `Benchmark` with a name is found by that name."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from mustdrop.errors import UnknownMethodError, did_you_mean
from mustdrop.eval.benchmark import Benchmark


@cache
def registry() -> dict[str, Benchmark]:
    """Name -> benchmark."""
    found: dict[str, Benchmark] = {}
    for module in pkgutil.iter_modules(__path__):
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Benchmark) and hasattr(value, "name"):
                found[value.name] = value()
    return found


def benchmarks() -> tuple[str, ...]:
    """Names that `mustdrop eval` knows, sorted."""
    return tuple(sorted(registry()))


def find(name: str) -> Benchmark:
    """The benchmark with this name.

    Raises:
        UnknownMethodError: no such benchmark; the message lists the known ones and the nearest.
    """
    known = registry()
    if name not in known:
        raise UnknownMethodError(f"there is no benchmark {name!r}. {did_you_mean(name, known)}")
    return known[name]
