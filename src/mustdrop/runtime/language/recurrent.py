"""Decoder layers that fold the tokens before them into one state, on a sequence that has become shorter.

To such a layer a token that was dropped has never been there: the tokens that are left follow one another. What it must
not fold is padding. On the left of a sequence that begins, transformers' own mask takes care of that: padding becomes
zeros, and the state is zero there. Behind a state that has begun it cannot: zeros are neighbours for a convolution, and
a state decays over them. Rows of unequal length are run one by one there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mustdrop.compat import CACHE_NAMES, cache_of, eager, give_cache
from mustdrop.errors import UnsupportedOptionError
from mustdrop.indices import PAD, on
from mustdrop.kv import PrunedState
from mustdrop.runtime.compile.decode_steps import compiled_step
from mustdrop.runtime.state import Forward, Local


def mask(forward: Forward, hidden: Tensor) -> Tensor | None:
    """(B, n) bool, the current rows that are no padding, as recurrent layers take it; None if none is padding."""
    assert forward.rows is not None, "asked for rows that are all there"
    if not forward.padded:
        return None
    key = ("recurrent", hidden.device)
    if key not in forward.memo:
        forward.memo[key] = on(forward.rows != PAD, hidden.device)
    return forward.memo[key]  # type: ignore[no-any-return]


class RowByRow:
    """Stands in for the forward of a recurrent layer: see the module."""

    def __init__(self, local: Local, index: int, function: Callable[..., Tensor]) -> None:
        functools.update_wrapper(self, function)
        self.local, self.index, self.function = local, index, function

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output (B, n, C); zeros where rows are padding after a state that has begun."""
        straight = self.local.straight is not None  # it begins all states
        if straight or compiled_step(self.local, (hidden, *args), kwargs) or not self._ragged(kwargs):
            return self.function(hidden, *args, **kwargs)
        return self._by_row(hidden, kwargs)

    @eager
    def _ragged(self, kwargs: dict[str, Any]) -> bool:
        """Whether rows are padded after a state that has begun."""
        forward, cache = self.local.forward, cache_of(kwargs)
        if forward is None or forward.rows is None or not forward.padded or cache is None:
            return False
        state = cache.layers[self.index]
        return isinstance(state, PrunedState) and state.begun

    @eager
    def _by_row(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        forward, cache = self.local.forward, cache_of(kwargs)
        assert forward is not None, "asked for a pass that has rows"
        assert forward.rows is not None, "asked for a pass that has rows"
        state: PrunedState = cache.layers[self.index]
        if state.record_past:
            raise UnsupportedOptionError(
                "pictures of unequal length in a batch, in a chat that goes on, and a cache that records its past "
                "(drafts that may be taken back): recurrent layers keep one such record for all rows. Send the rows "
                "one by one, or generate without drafts."
            )
        out = torch.zeros_like(hidden)
        for b, missing in enumerate((forward.rows == PAD).sum(1).tolist()):
            if missing == hidden.shape[1]:
                continue
            own = {name: _of_row(value, b, missing, hidden) for name, value in kwargs.items()}
            own["attention_mask"] = None
            give_cache(own, _with(cache, self.index, state.row(b)), CACHE_NAMES[0])
            out[b : b + 1, missing:] = self.function(hidden[b : b + 1, missing:], **own)
        return out


def _with(cache: Any, index: int, state: PrunedState) -> Any:
    """A cache whose layer `index` is another; the others are as they are."""
    other = copy.copy(cache)
    other.layers = [*cache.layers]
    other.layers[index] = state
    return other


def _of_row(value: Any, b: int, missing: int, hidden: Tensor) -> Any:
    """What one row of the batch has of an argument, without its padding."""
    if isinstance(value, tuple):
        return tuple(_of_row(part, b, missing, hidden) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[:2] != hidden.shape[:2]:
        return value
    return value[b : b + 1, missing:]
