"""Small tensors that follow from shapes alone, made once per device: a server sees the same few shapes all day."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LARGE = 1 << 20  # bytes of a table that is not worth remembering
_MOST = 512
_MADE: OrderedDict[Any, tuple[Any, Tensor]] = OrderedDict()


def constant(key: Any, device: torch.device, make: Callable[[], Tensor], holds: Any = None) -> Tensor:
    """What `make` makes on `device`. Nobody writes to it.

    Args:
        key: says what it is, device aside.
        device: where it lies.
        make: called the first time.
        holds: objects whose `id` is part of the key, so that no other one gets their ids.
    """
    if torch.compiler.is_compiling():  # a graph makes its own
        return make()
    known = _MADE.get((key, device))
    if known is not None:
        _MADE.move_to_end((key, device))
        return known[1]
    with torch.inference_mode(False):  # a later call may train
        made = make()
    if type(made) is Tensor:  # and not what stands in for a tensor while something is traced
        if len(_MADE) >= _MOST:
            _MADE.popitem(last=False)
        _MADE[key, device] = holds, made
    return made


def numbers(values: Sequence[int], device: torch.device) -> Tensor:
    """(n,) long, these numbers."""
    return sent(np.array(values, dtype=np.int64), device)


def count_up(batch: int, n: int, device: torch.device) -> Tensor:
    """(B, n) long, 0 to n - 1 in each row."""
    return constant(("count up", n), device, lambda: torch.arange(n, dtype=torch.long, device=device)).expand(batch, -1)


def sent(table: np.ndarray, device: torch.device) -> Tensor:
    """A table of the host on `device`; one that has been sent before lies there already."""

    def send() -> Tensor:
        own = table.copy()
        made = torch.from_numpy(own).to(device, non_blocking=True)
        made._host_table = own  # type: ignore[attr-defined]
        return made

    if table.nbytes > _LARGE:
        return send()
    return constant(("table", table.shape, table.dtype.str, table.tobytes()), device, send)


def host_table(x: Tensor) -> np.ndarray | None:
    """The numbers of a tensor that was `sent`; None where only its device knows them."""
    return getattr(x, "_host_table", None)


def on_host(x: Tensor) -> np.ndarray:
    """The numbers of a tensor. Nothing waits where it was `sent`."""
    known = host_table(x)
    return x.detach().cpu().numpy() if known is None else known


def highest(x: Tensor) -> int:
    """The highest number of a tensor. Nothing waits where it was `sent`."""
    known = host_table(x)
    return int(x.max()) if known is None else int(known.max())


def where(stays: Tensor, x: Tensor, other: float) -> Tensor:
    """`x` where `stays` is True, else the number, with one launch."""
    number = constant(
        ("number", str(other), x.dtype), x.device, lambda: torch.full((), other, dtype=x.dtype, device=x.device)
    )
    return torch.where(stays, x, number)


def every(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Bool, True everywhere."""
    return constant(("every", shape), device, lambda: torch.ones(shape, dtype=torch.bool, device=device))


_TABLES: OrderedDict[int, tuple[Tensor, np.ndarray]] = OrderedDict()


def table(x: Tensor) -> np.ndarray:
    """The numbers of a tensor of the host that nobody writes to, for arithmetic without torch."""
    known = _TABLES.get(id(x))
    if known is not None:
        _TABLES.move_to_end(id(x))
        return known[1]
    made = x.numpy()
    if len(_TABLES) >= _MOST:
        _TABLES.popitem(last=False)
    _TABLES[id(x)] = x, made  # holding it keeps its id from being used again
    return made
