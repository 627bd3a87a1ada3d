"""Independent copies of plain models, thousands of them in a session.

`copy.deepcopy` walks some eight thousand objects of a tiny model in Python. Here all but tensors and functions are
pickled once, and each copy is made of that. Tensors are copied as `copy.deepcopy` does, so weights that are tied stay
tied; functions (hooks that transformers has put in) are shared, as it shares them.
"""

from __future__ import annotations

import copy
import io
import pickle
import types
import weakref
from typing import Any

from torch import Tensor, nn

_PICKLED: weakref.WeakKeyDictionary[nn.Module, tuple[bytes, list[Any]]] = weakref.WeakKeyDictionary()


class _WithoutTensors(pickle.Pickler):
    """Leaves tensors and functions out, in the order in which it meets them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.left_out: list[Any] = []

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, Tensor | types.FunctionType):
            return None
        self.left_out.append(thing)
        return len(self.left_out) - 1


class _WithTensors(pickle.Unpickler):
    """Puts other things where some were left out."""

    def __init__(self, file: io.BytesIO, put_in: list[Any]) -> None:
        super().__init__(file)
        self.put_in = put_in

    def persistent_load(self, number: int) -> Any:
        return self.put_in[number]


def copy_of(model: nn.Module) -> Any:
    """As `copy.deepcopy(model)`, of a model as it was at its first copy."""
    if model not in _PICKLED:
        file = io.BytesIO()
        pickler = _WithoutTensors(file)
        pickler.dump(model)
        _PICKLED[model] = file.getvalue(), pickler.left_out
    everything, left_out = _PICKLED[model]
    return _WithTensors(io.BytesIO(everything), copy.deepcopy(left_out)).load()
