"""What describes slots and lies on a device: the host asks for it once, if ever it must know."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mustdrop.indices import HOST


class OnDevice:
    """A tensor that describes slots and lies on a device: the host asks for it once, if ever somebody must know.

    A prompt whose counts are known beforehand is cut without the host, and most of what follows needs no more than
    whether there is such a description.
    """

    def __init__(self, there: Tensor, whole: OnDevice | None = None, at: int = 0) -> None:
        """`there` may be the first columns of row `at` of a `whole`, which comes over once for all its parts."""
        self.there, self.whole, self.at = there, whole, at

    @classmethod
    def of(cls, there: Tensor) -> OnDevice:
        """The one that stands for a tensor, so that layers which share the tensor share what the host learned."""
        known: OnDevice | None = getattr(there, "_away", None)
        if known is None:
            known = there._away = cls(there)  # type: ignore[attr-defined]
        return known

    @classmethod
    def parts(cls, whole: Tensor, widths: Sequence[int]) -> list[Tensor]:
        """The first columns of each row of `whole` (L, B, n); layers that are given them share what the host learns."""
        rows = [row[:, :width] for row, width in zip(whole.unbind(), widths, strict=True)]
        if whole.device != HOST:
            all_of_it = cls(whole)
            for i, row in enumerate(rows):
                row._away = cls(row, all_of_it, i)  # type: ignore[attr-defined]
        return rows

    @functools.cached_property
    def here(self) -> Tensor:
        """The tensor on the host (waits for its device)."""
        return self.there.to(HOST) if self.whole is None else self.whole.here[self.at][:, : self.there.shape[1]]

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return self.there.shape

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        return OnDevice(self.there.clone())

    def __reduce__(self) -> Any:
        return OnDevice, (self.there,)


def at_home(x: Tensor | OnDevice | None) -> Tensor | None:
    """A description on the host."""
    return x.here if isinstance(x, OnDevice) else x


class Description:
    """An attribute of a layer that is read on the host, wherever the tensor was that was set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = "_" + name

    def __get__(self, layer: Any, owner: type) -> Any:
        return at_home(getattr(layer, self.name))

    def __set__(self, layer: Any, value: Tensor | OnDevice | None) -> None:
        layer.__dict__[self.name] = wherever(value)


def wherever(value: Tensor | OnDevice | None) -> Tensor | OnDevice | None:
    """What a layer notes of a tensor: itself on the host, what stands for it elsewhere."""
    return OnDevice.of(value) if isinstance(value, Tensor) and value.device != HOST else value
