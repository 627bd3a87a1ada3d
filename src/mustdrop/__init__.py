"""mustdrop: multimodal models that drop the vision tokens that do not matter, at every stage of a token's life.

One line patches a Hugging Face model in place, `mustdrop.patch(model)`; `model.generate(...)` works as before.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mustdrop.deprecation import RENAMED, warn

if TYPE_CHECKING:
    from mustdrop import errors
    from mustdrop.adapters import adapters, list_adapters
    from mustdrop.compiling import compile
    from mustdrop.config import load_config
    from mustdrop.method import Method, Recipe
    from mustdrop.patching import last_trace, patch, patched, trace, unpatch
    from mustdrop.pruners import DecodeCachePruner, InputPruner, PrefillPruner, VisionStagePruner
    from mustdrop.registry import list_methods, methods, register, unregister
    from mustdrop.selection import Selection
    from mustdrop.trace import Trace
    from mustdrop.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "DecodeCachePruner",
    "InputPruner",
    "Method",
    "PrefillPruner",
    "Recipe",
    "Selection",
    "Trace",
    "VisionStagePruner",
    "adapters",
    "compile",
    "errors",
    "last_trace",
    "list_adapters",
    "list_methods",
    "load_config",
    "methods",
    "patch",
    "patched",
    "register",
    "trace",
    "tune",
    "unpatch",
    "unregister",
]

# Where each public name lives. Its module, and torch with it, is imported when the name is first asked for: the command
# line starts without them. A new name is a line here, one in `__all__` and one above for type checkers.
_HOMES = {
    "DecodeCachePruner": "pruners",
    "InputPruner": "pruners",
    "Method": "method",
    "PrefillPruner": "pruners",
    "Recipe": "method",
    "Selection": "selection",
    "Trace": "trace",
    "VisionStagePruner": "pruners",
    "adapters": "adapters",
    "compile": "compiling",
    "errors": "",
    "last_trace": "patching",
    "list_adapters": "adapters",
    "list_methods": "registry",
    "load_config": "config",
    "methods": "registry",
    "patch": "patching",
    "patched": "patching",
    "register": "registry",
    "trace": "patching",
    "tune": "tuning",
    "unpatch": "patching",
    "unregister": "registry",
}


class _Package(ModuleType):
    """This package. `mustdrop.trace` stays the function, though importing the module `mustdrop.trace` would bind it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and _HOMES.get(name)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


if not TYPE_CHECKING:  # type checkers should know the names above, and no others

    def __getattr__(name: str) -> Any:
        """A public name, or a submodule, imported now."""
        home = _HOMES.get(name)
        if home:
            value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            return value
        if name in RENAMED:
            new, since = RENAMED[name]
            warn(f"{__name__}.{name}", f"{__name__}.{new}", since)
            return getattr(sys.modules[__name__], new)
        if not name.startswith("_"):
            try:
                return importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
