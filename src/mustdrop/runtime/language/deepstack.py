"""What some text models add to the hidden states of vision tokens between layers (DeepStack), cut with the tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from mustdrop.indices import on, take
from mustdrop.runtime.state import Local


class AdditionWrapper:
    """Stands in for a text model's method(hidden, mask, rows): adds to the tokens that are left what is theirs."""

    def __init__(self, local: Local, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        functools.update_wrapper(self, function)
        self.local, self.function = local, function

    def __call__(self, hidden: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """Add `rows`, one per True of `mask` (B, length), to the current rows of `hidden` (B, n, C)."""
        forward, straight = self.local.forward, self.local.straight
        if straight is not None:
            return straight.add(hidden, mask, rows)
        if forward is None or forward.rows is None:
            return self.function(hidden, mask, rows)
        mask = on(mask, forward.rows.device)
        here = forward.current(mask)
        ordinal = mask.flatten().cumsum(0).view(mask.shape) - 1
        index = take(ordinal, forward.rows, 1)[here]
        return self.function(hidden, on(here, hidden.device), rows[on(index, rows.device)])
