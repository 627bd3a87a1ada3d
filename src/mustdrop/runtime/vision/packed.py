"""Fewer patches inside a packed encoder: what leaves before a layer, and what follows the patches that are left.

A packed encoder (Qwen-VL and others) has the patches of all pictures and frames in one sequence. Its layers take the
hidden states, the borders between pictures, frames or windows, and a rotary table with a row for each patch. When
patches leave, all of these follow: so a patch keeps its position, and attends to what is left of its frame or window.

Patches leave in cells, the patches that one feature is made of, so the merger after the layers still sees whole
cells. A merged cell takes the place, and the positions, of the cell that names its window; each of its patches is the
mean of the patches at its place in the window's cells.

Mergers that take cell after cell run on those that are left; where the model arranges patches by picture after the
layers, the last of these gives the sequence its full length back. In both cases rows of what is gone hold zeros there,
and the marks in the features say so (`runtime/vision/marks.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mustdrop.indices import HOST

#: What a rule may say before a layer: the feature that each became part of (F,), -1 where it is gone; and perhaps new
#: values of the cells that are left, from the values of all (F, k * C).
Decision = tuple[Tensor, Callable[[Tensor], Tensor] | None]


@dataclass
class Packed:
    """The patches of one pass through a packed encoder.

    Attributes:
        cells: (F, k) long on the host, the patches of each feature; -1 fills up.
        steps: layer -> what decides, before it runs, from what `states` gives; in this order.
        owner: (F,) long, the feature that each became part of, -1 where it is gone.
        unmade: (L,) long, rows of pixels that are not made into patches; None: all are.
        made: (M,) long, rows of pixels that were, ascending; known once that has run.
        total: N, patches of the whole sequence; known once the first layer runs.
        rows: (M,) long, patches that are left, ascending; None: all.
        into: (N,) long, slot among `rows` of what each patch became part of, -1 where it is gone; None: all are left.
        spread: number of rows that there were at some time -> `into` of that time.
        skipped: modules after the layers, with how many cells fewer each ran on.
    """

    cells: Tensor
    steps: dict[int, list[Callable[[Callable[[], Tensor]], Decision | None]]] = field(default_factory=dict)
    owner: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long, device=HOST))
    unmade: Tensor | None = None
    made: Tensor | None = None
    total: int = 0
    rows: Tensor | None = None
    into: Tensor | None = None
    spread: dict[int, Tensor] = field(default_factory=dict)
    skipped: list[tuple[nn.Module, int]] = field(default_factory=list)
    _followed: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _longest: dict[int, int] = field(default_factory=dict)  # borders that were made -> the longest between them

    def __post_init__(self) -> None:
        self.owner = torch.arange(len(self.cells), dtype=torch.long, device=HOST)

    def add(self, layer: int, step: Callable[[Callable[[], Tensor]], Decision | None]) -> None:
        """Ask `step` before `layer` runs."""
        self.steps.setdefault(layer, []).append(step)

    def before(
        self, index: int, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of an encoder layer for the patches that are left; None if all are.

        Args:
            index: of the layer.
            names: of the arguments that come by position.
            args: of the layer; the first are the hidden states, (N, C) or (1, N, C), as the layer before left them.
            kwargs: of the layer.
        """
        hidden: Tensor = args[0]
        if index == 0:
            self.enter(hidden)
        for step in self.steps.get(index, ()):
            decision = step(lambda hidden=hidden: self.states(hidden))  # type: ignore[misc]
            if decision is not None:
                hidden = self._shrink(hidden, *decision)
        if self.rows is None:
            return None
        given = dict(zip(names[1:], args[1:], strict=False)) | kwargs
        named = {name: self._follow(name, value) for name, value in given.items()}
        lengths = [self._longest[id(value)] for value in named.values() if id(value) in self._longest]
        for name, value in named.items():  # the longest sequence goes with its borders
            if name.startswith("max_") and value is not None and lengths:
                named[name] = torch.full_like(value, lengths[0]) if isinstance(value, Tensor) else lengths[0]
        self.finish(named, hidden)
        return (hidden, *(named.pop(name) for name in names[1 : len(args)])), named

    def finish(self, named: dict[str, Any], hidden: Tensor) -> None:
        """Change arguments of a layer, by name, that depend on each other; nothing here."""

    def enter(self, hidden: Tensor) -> None:
        """Note how many patches there are, (N, C) or (1, N, C) as the first layer gets them."""
        self.total = hidden.shape[-2]

    def states(self, hidden: Tensor) -> Tensor:
        """(F, k * C) of hidden states of the patches that are left: the patches of each cell side by side.

        Merged cells have what their window has, those that are gone zeros.
        """
        flat, real = hidden.flatten(0, -2), self.cells >= 0
        slot = self.cells.clamp(min=0) if self.into is None else self.into[self.cells.clamp(min=0)]
        real = (real & (slot >= 0)).to(flat.device)
        found = flat[slot.clamp(min=0).to(flat.device)]
        return found.masked_fill(~real[..., None], 0).flatten(1)

    def whole(self, found: Tensor) -> Tensor:
        """(N, ...) of what is known of the rows that are left, or were at some time; zeros where a patch was gone."""
        into = self.spread.get(len(found))
        if into is None:
            return found
        into = into.to(found.device)
        out = found[into.clamp(min=0)]
        return out.masked_fill((into < 0).view(-1, *[1] * (out.ndim - 1)), 0)

    def whole_cells(self, found: Tensor) -> Tensor:
        """(cells, ...) of what a merger made of the cells that are left; zeros where one is gone."""
        if self.into is None or self.rows is None:
            return found
        k = self.cells.shape[1]
        if len(found) * k != len(self.rows):
            return found
        into = self.into[::k].to(found.device)
        out = found[into.clamp(min=0) // k]
        return out.masked_fill((into < 0).view(-1, *[1] * (out.ndim - 1)), 0)

    def before_embedding(self, pixels: Tensor) -> Tensor:
        """(M, ...) pixels of the patches that enter, of all (P, ...)."""
        assert self.unmade is not None
        enters = torch.ones(len(pixels), dtype=torch.bool, device=HOST)
        enters[self.unmade] = False
        self.made = enters.nonzero()[:, 0]
        return pixels.index_select(0, self.made.to(pixels.device))

    def after_embedding(self, patches: Tensor) -> Tensor:
        """(P, ...) all patches, of those that enter (M, ...); zeros where one does not."""
        assert self.unmade is not None
        assert self.made is not None
        out = patches.new_zeros(len(self.made) + len(self.unmade), *patches.shape[1:])
        return out.index_copy(0, self.made.to(patches.device), patches)

    def after_last(self, output: Any) -> Any:
        """What the last layer gives, with all patches: the model arranges them by picture next."""
        if isinstance(output, tuple):
            return (self._full(output[0]), *output[1:])
        return self._full(output)

    def after_merger(self, module: nn.Module, output: Tensor) -> Tensor:
        """What a merger gives, with all cells."""
        whole = self.whole_cells(output)
        if len(whole) != len(output):
            self.skipped.append((module, len(whole) - len(output)))
        return whole

    def after_tower(self, output: Any) -> Any:
        """What the encoder gives, with all patches, or all cells, in each hidden state."""
        states = getattr(output, "hidden_states", None)
        if isinstance(states, tuple):
            output["hidden_states"] = tuple(map(self._full, states))
        last = getattr(output, "last_hidden_state", None)
        if isinstance(last, Tensor) and self.rows is not None:
            mine = last.shape[-2] == len(self.rows)
            output["last_hidden_state"] = self._full(last) if mine else self.whole_cells(last)
        return output

    def _full(self, hidden: Tensor | None) -> Tensor | None:
        if hidden is None:  # nobody asked for this one
            return None
        flat = self.whole(hidden.flatten(0, -2))
        return flat if hidden.ndim == 2 else flat[None]

    # -- what shrinks ------------------------------------------------------------------------------------------------

    def _shrink(self, hidden: Tensor, owner: Tensor, values: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Hidden states of what is left when each feature became part of `owner` (F,), -1: gone."""
        # what had merged before goes where its window goes
        owner = torch.where(self.owner < 0, -1, owner[self.owner.clamp(min=0)])
        if torch.equal(owner, self.owner) and values is None:
            return hidden
        states = None if values is None else self.states(hidden)
        sources = self.rows if self.rows is not None else torch.arange(self.total, dtype=torch.long, device=HOST)
        target = torch.arange(self.total, dtype=torch.long, device=HOST)  # of each patch, the one that it is part of
        real = self.cells >= 0
        gone = (owner < 0)[:, None] & real
        goal = self.cells[owner.clamp(min=0)]
        target[self.cells[real]] = goal[real]
        target[self.cells[gone]] = -1
        self.owner = owner
        self.rows = self.arranged(target == torch.arange(self.total, dtype=torch.long, device=HOST))
        slot, here = torch.full((self.total,), -1, dtype=torch.long, device=HOST), self.rows >= 0
        slot[self.rows[here]] = here.nonzero()[:, 0]
        self.into = torch.where(target < 0, -1, slot[target.clamp(min=0)])
        self.spread[len(self.rows)] = self.into
        self._followed.clear()
        self._longest.clear()
        came = torch.where(sources < 0, -1, self.into[sources.clamp(min=0)])
        out = self.shaped(_means(hidden.flatten(0, -2), came.to(hidden.device), len(self.rows)), hidden)
        if values is not None and states is not None:
            out = self._written(out, values(states))
        return out

    def arranged(self, stays: Tensor) -> Tensor:
        """(M,) long, patches in the places of the layers' rows; -1 is padding.

        Args:
            stays: (N,) bool, patches that are left.
        """
        return stays.nonzero()[:, 0]

    def shaped(self, flat: Tensor, like: Tensor) -> Tensor:
        """(M, C) as hidden states of the layers, with as many dimensions as `like`."""
        return flat if like.ndim == 2 else flat[None]

    def _written(self, hidden: Tensor, states: Tensor) -> Tensor:
        """Hidden states with the values of the cells (F, k * C) that are left."""
        assert self.into is not None
        mine = self.owner == torch.arange(len(self.owner), dtype=torch.long, device=HOST)
        cells = self.cells[mine]
        real = cells >= 0
        slot = self.into[cells[real]].to(hidden.device)
        values = states[mine.to(states.device)].view(*cells.shape, -1)[real.to(states.device)]
        flat = hidden.flatten(0, -2).clone()
        flat[slot] = values.to(flat)
        return self.shaped(flat, hidden)

    # -- what follows ------------------------------------------------------------------------------------------------

    def _follow(self, name: str, value: Any) -> Any:
        """An argument of a layer for the patches that are left."""
        if isinstance(value, tuple) and value and all(isinstance(part, Tensor) for part in value):
            return tuple(self._follow(name, part) for part in value)
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if id(value) not in self._followed:  # holding the value keeps its id from being used again
            self._followed[id(value)] = value, self.made_of(name, value)
        return self._followed[id(value)][1]

    def made_of(self, name: str, value: Tensor) -> Tensor:
        """One argument of a layer with what belongs to the patches that are left."""
        assert self.rows is not None
        if name.startswith("cu_"):
            left = torch.zeros(self.total + 1, dtype=torch.long, device=HOST)
            left[self.rows + 1] = 1
            borders = left.cumsum(0)[value.to(HOST, torch.long)]
            lengths = borders.diff()
            first = torch.ones_like(borders[:1], dtype=torch.bool)
            made = borders[torch.cat([first, lengths > 0])].to(value)  # nothing is left of some windows
            self._longest[id(made)] = int(lengths.max())
            return made
        rows = self.rows.to(value.device)
        if name == "attention_mask" and value.ndim == 4:
            return value.index_select(3, rows).index_select(2, rows)
        for dim, size in enumerate(value.shape):
            if size == self.total:
                return value.index_select(dim, rows)
        return value


def _means(hidden: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Hidden states (M, C) gathered into their slots (M,), -1: gone; what shares one becomes its mean."""
    real = slot >= 0
    flat, slot = hidden[real], slot[real]
    if len(flat) == slots:  # nothing is merged
        out = flat[slot.argsort()]
    else:
        size = torch.bincount(slot, minlength=slots)
        total = flat.new_zeros(slots, flat.shape[1], dtype=torch.float32).index_add(0, slot, flat.float())
        first = torch.zeros(slots, dtype=torch.long, device=slot.device)
        first[slot] = torch.arange(len(slot), dtype=torch.long, device=slot.device)
        out = torch.where((size > 1)[:, None], (total / size[:, None]).to(flat.dtype), flat[first])
    return out
