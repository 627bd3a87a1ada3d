"""Nested values taken apart into tensors and a form: where forms are equal, only what is in the tensors differs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor

from mustdrop.errors import UnsupportedOptionError

_PLAIN = (bool, int, float, str, type(None))


def apart(value: Any, tensors: list[Tensor]) -> Hashable:
    """The form of `value`, whose tensors are appended to `tensors` in order.

    Args:
        value: tensors, numbers, words and None, in tuples, lists and dicts.
        tensors: is added to.

    Raises:
        UnsupportedOptionError: something else is in it.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        tensors.append(value)
        return (Tensor, tuple(value.shape), value.dtype, value.device)
    if kind in _PLAIN:
        return (kind, value)  # 1 and True are equal
    if kind in (tuple, list):
        return (kind, *(apart(part, tensors) for part in value))
    if kind is dict:
        return (dict, *((name, apart(part, tensors)) for name, part in value.items()))
    raise UnsupportedOptionError(f"a {kind.__name__} among the arguments cannot be part of a captured pass.")


def together(form: Any, tensors: Iterator[Tensor]) -> Any:
    """The value of this form that holds the tensors which come next."""
    kind = form[0]
    if kind is Tensor:
        return next(tensors)
    if kind in _PLAIN:
        return form[1]
    if kind is dict:
        return {name: together(part, tensors) for name, part in form[1:]}
    return kind(together(part, tensors) for part in form[1:])
