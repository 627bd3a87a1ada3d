"""Two pictures of one scene, in which one thing has changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mustdrop.demo.drawing import COLOURS, DIGITS, background, object_mask, to_uint8
from mustdrop.demo.scenes import CELLS
from mustdrop.demo.tasks.common import Mark, Question, Sample, in_split, pick, put, sizes

SIZES = sizes(80, 144, 64)
CHANGES = ("color", "digit", "place", "new", "gone", "nothing")
ABILITY = {"change": "change", "which": "change", "color_then": "attributes", "digit_then": "attributes"}


@dataclass(frozen=True)
class Change:
    """What changed, and the objects as (digit, colour, cell) before and after."""

    what: str
    before: tuple[tuple[str, str, int], ...]
    after: tuple[tuple[str, str, int], ...]
    at: int


def draw(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Sample:
    """Two to five coloured digits on a 3 x 3 grid of cells, twice."""
    height, width = size
    what = pick(rng, CHANGES)
    while True:
        cells = [int(cell) for cell in rng.permutation(CELLS * CELLS)]
        number = int(rng.integers(2, 6))
        if in_split(split, "pair", size, what, cells[0], sorted(cells[1:number])):
            break
    kinds = [str(kind) for kind in rng.permutation(list(DIGITS))]
    inks = [str(ink) for ink in rng.permutation(list(COLOURS))]
    objects = [(kinds[i], inks[i], cells[i]) for i in range(number)]
    before, after = list(objects), list(objects)
    kind, ink, cell = objects[0]
    if what == "color":
        after[0] = (kind, inks[number], cell)
    elif what == "digit":
        after[0] = (kinds[number], ink, cell)
    elif what == "place":
        after[0] = (kind, ink, cells[number])
    elif what == "new":
        before = before[1:]
    elif what == "gone":
        after = after[1:]
    ground = background(rng, height, width)
    masks: dict[tuple[str, int], tuple[np.ndarray, int, int, int]] = {}
    pictures, marks = [], []
    for index, shown in enumerate((before, after)):
        canvas = ground.copy()
        for kind, ink, cell in shown:
            if (kind, cell) not in masks:
                mask = object_mask(rng, kind, split)
                row, column = divmod(cell, CELLS)
                top, left = (
                    int(rng.integers(side * whole // CELLS + 1, (side + 1) * whole // CELLS - len(mask)))
                    for side, whole in ((row, height), (column, width))
                )
                masks[kind, cell] = mask, top, left, int(rng.integers(2**32))
            mask, top, left, seed = masks[kind, cell]
            mark = put(np.random.default_rng(seed), canvas, mask, ink, top, left)
            marks.append(replace(mark, kind=kind, picture=index))
        canvas += rng.normal(0, 0.01, canvas.shape[:2])[..., None].astype(np.float32)
        pictures.append(to_uint8(canvas))
    return Sample("changes", tuple(pictures), tuple(marks), Change(what, tuple(before), tuple(after), 0))


def ask(rng: np.random.Generator, sample: Sample, question_type: str) -> Question | None:
    """A random question of one type; None where these pictures admit none."""
    change: Change = sample.facts
    if question_type == "change":
        text, answer = "what changed ?", change.what
    elif question_type == "which":
        if change.what == "nothing":
            return None
        kind, ink, _ = (change.after if change.what == "new" else change.before)[0]
        text, answer = "which one changed ?", f"the {kind if change.what == 'color' else ink} one"
    else:
        number = pick(rng, (0, 1))
        kind, ink, _ = pick(rng, change.after if number else change.before)
        where = f"in the {('first', 'last')[number]} picture ?"
        if question_type == "color_then":
            text, answer = f"what color is the {kind} {where}", ink
        else:
            text, answer = f"what digit is {ink} {where}", kind
    return Question(text, answer, question_type, ABILITY[question_type])


__all__ = ["Mark", "ask", "draw"]
