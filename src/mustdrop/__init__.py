"""mustdrop: multimodal models that drop the vision tokens that do not matter, at every stage of a token's life.

One line patches a Hugging Face model in place, `mustdrop.patch(model)`; `model.generate(...)` works as before.
"""

from mustdrop import errors
from mustdrop.adapters import adapters, list_adapters
from mustdrop.config import load_config
from mustdrop.method import Method, Recipe
from mustdrop.patching import last_trace, patch, patched, trace, unpatch
from mustdrop.pruners import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.registry import list_methods, methods, register, unregister
from mustdrop.selection import Selection
from mustdrop.trace import Trace
from mustdrop.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "DecodeCachePruner",
    "Method",
    "PrefillPruner",
    "Recipe",
    "Selection",
    "Trace",
    "VisionStagePruner",
    "adapters",
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
