"""Which pictures and videos the vision tokens of each prompt belong to, and what the vision stage decided of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from mustdrop.layout import Layout
from mustdrop.runtime.records import Marks, Medium
from mustdrop.runtime.state import Call


@dataclass(frozen=True, eq=False)
class PromptMedia:
    """The media of a pass, looked for when somebody asks: most passes need them for their trace alone, or never.

    Attributes:
        layouts: kind of media -> per prompt and medium, how its features lie.
        decided: kind of media -> per prompt and medium, what the vision stage decided; empty without one.
        names: of the kinds, by number.
        kinds: (B, length) long, number of the kind that each position stands for, -1 for text.
    """

    layouts: dict[str, list[list[Layout]]]
    decided: dict[str, list[list[Marks]]]
    names: list[str]
    kinds: np.ndarray

    @classmethod
    def of(cls, call: Call | None, names: list[str], kinds: np.ndarray) -> PromptMedia:
        """Those of a pass. What later passes of the call encode changes nothing in it."""
        if call is None:
            return cls({}, {}, names, kinds)
        return cls(dict(call.layouts), dict(call.marks), names, kinds)

    @functools.cached_property
    def media(self) -> list[list[Medium]]:
        """Per batch row, repeated where the batch was expanded for beams; empty if the encoder saw other media."""
        prompts = max((len(rows) for rows in self.layouts.values()), default=0)
        if not prompts or len(self.kinds) % prompts:
            return []
        times = len(self.kinds) // prompts
        out = []
        for row, own in enumerate(self.kinds):
            found = self._of_row(own[own >= 0], row // times, prompts)
            if found is None:
                return []
            out.append(found)
        return out

    def _of_row(self, own: np.ndarray, prompt: int, prompts: int) -> list[Medium] | None:
        """Media of one row, whose vision tokens are of the kinds `own` (N,); None if they do not fit its layouts."""
        media: list[tuple[int, Medium]] = []
        for i, name in enumerate(self.names):
            place = np.flatnonzero(own == i)
            layouts = self.layouts.get(name, [[]] * prompts)[prompt]
            sizes = [layout.size for layout in layouts]
            if sum(sizes) != len(place):
                return None
            parts = np.split(place, np.cumsum(sizes)[:-1]) if sizes else []
            media += [
                (int(part[0]), Medium(name, layout, part))
                for layout, part in zip(layouts, parts, strict=True)
                if len(part)
            ]
        return [medium for _, medium in sorted(media, key=lambda pair: pair[0])]

    @functools.cached_property
    def marks(self) -> list[list[Marks]]:
        """What the vision stage decided, per batch row and medium; empty without one."""
        if not self.decided:
            return []
        by_layout = {
            id(layout): mark
            for kind, rows in self.decided.items()
            for layouts, marks in zip(self.layouts[kind], rows, strict=True)
            for layout, mark in zip(layouts, marks, strict=True)
        }
        return [[by_layout[id(medium.layout)] for medium in row] for row in self.media]

    def spread(self) -> list[Marks]:
        """What the vision stage decided, per batch row over its vision tokens; empty without one."""
        return [Marks.of_prompt(row, marks) for row, marks in zip(self.media, self.marks, strict=False)]
