"""A cache layer without entries: the state into which a recurrent layer has folded the tokens that came.

Nothing in it belongs to one token, so nothing can leave it. To the runtime it is a layer that stores no entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mustdrop.compat import LinearAttentionLayer
from mustdrop.kv.entries import Held, Stored
from mustdrop.kv.slots import Slots


class PrunedState(Slots, LinearAttentionLayer):  # type: ignore[misc]  # older transformers have none
    """The state of one recurrent layer (linear attention, a short convolution), as transformers keeps it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keys = self.values = None
        self.forget()

    @classmethod
    def adopt(cls, layer: Any) -> PrunedState:
        """Take over a layer of transformers, with what it holds."""
        new = cls()
        new.__dict__.update(vars(layer))
        return new

    def row(self, b: int) -> PrunedState:
        """The state of one row of the batch: what is written to it in place is written to this one."""
        new = PrunedState.adopt(self)
        for name in ("conv_states", "recurrent_states"):
            held: dict[int, Tensor | None] = getattr(self, name)
            setattr(new, name, {i: None if state is None else state[b : b + 1] for i, state in held.items()})
        new.has_previous_state = dict(self.has_previous_state)
        return new

    def hold(self, held: Held, totals: Tensor, advance: int) -> None:
        """Take the state of an inner cache's layer; this one has none."""
        mine = {"arrival", "prepared"}
        self.__dict__.update({name: value for name, value in vars(held.layer).items() if name not in mine})

    @property
    def begun(self) -> bool:
        """Whether any token has come."""
        return any(self.has_previous_state.values())

    @property
    def slots(self) -> int:
        """No entries."""
        return 0

    def slot_positions(self, extra: int = 0) -> Tensor | None:
        """No entries, so no positions."""
        return None

    def stored(self, slots: int | Tensor, before: Stored | None = None) -> Stored:
        """What the layer stores now: no entries."""
        return Stored(None, 0, 0, 0)

    @property
    def plain(self) -> bool:
        """There are no entries that a hook would be needed for."""
        return self.arrival is None

    def slide(self) -> None:
        """A pass has ended: what was to arrive has been folded into the state."""
        self.arrival = None

    def storage_bytes(self) -> int:
        """Bytes of the states."""
        held = (*self.conv_states.values(), *self.recurrent_states.values())
        return sum(state.nbytes for state in held if state is not None)

    def bytes_held(self) -> tuple[int, int]:
        """Bytes of the states, and those that the layer would take: as many."""
        held = self.storage_bytes()
        return held, held

    def select_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        """Nothing is known of rows; transformers selects those of the states."""
