"""Scenes of any size and aspect ratio: coloured digits and shapes, asked about as the first demo model's are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mustdrop.demo.drawing import COLOURS, background, object_mask, to_uint8
from mustdrop.demo.scenes import CELLS, QUESTION_TYPES, SceneObject, random_kind
from mustdrop.demo.scenes import ask as ask_scene
from mustdrop.demo.tasks.common import (
    BINS,
    Mark,
    Question,
    Sample,
    in_split,
    pick,
    place,
    put,
    sizes,
    unique,
)

SIZES = sizes(80, 240, 150)
ABILITY = {
    "color2digit": "attributes", "digit2color": "attributes", "region2obj": "position", "region2color": "position",
    "locate": "position", "exist": "attributes", "count": "counting", "describe": "attributes",
}  # fmt: skip
POINTING = {"point_color": "position", "point_kind": "position", "what_at": "position"}


def draw(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Sample:
    """A scene of three to eight objects, at most one in a cell of a 3 x 3 grid and no two of one colour."""
    height, width = size
    while True:
        cells = [int(cell) for cell in rng.permutation(CELLS * CELLS)[: rng.integers(3, 9)]]
        if in_split(split, "scene", size, sorted(cells)):
            break
    canvas = background(rng, height, width)
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))]
    marks, objects = [], []
    for cell, colour in zip(cells, colours, strict=False):
        kind = random_kind(rng)
        mask = object_mask(rng, kind, split)
        row, column = divmod(cell, CELLS)
        top, left = (
            int(rng.integers(side * whole // CELLS + 1, (side + 1) * whole // CELLS - len(mask)))
            for side, whole in ((row, height), (column, width))
        )
        marks.append(replace(put(rng, canvas, mask, colour, top, left), kind=kind))
        objects.append(SceneObject(kind, colour, cell, top, left, len(mask)))
    return Sample("scenes", (to_uint8(canvas),), tuple(marks), tuple(objects))


def ask(rng: np.random.Generator, sample: Sample, question_type: str) -> Question | None:
    """A random question of one of the first model's types."""
    made = ask_scene(rng, sample.facts, question_type)
    return None if made is None else Question(made.text, made.answer, question_type, ABILITY[question_type])


def _pointing(mark: Mark, size: tuple[int, int], asked: str, question_type: str) -> Question:
    x, y = place(mark, size)
    (height, width), slack = size, 0.5 / BINS  # the answer is the middle of a bin, so half a bin is not its fault
    box = (
        mark.top / height - slack, mark.left / width - slack,
        (mark.top + mark.height) / height + slack, (mark.left + mark.width) / width + slack,
    )  # fmt: skip
    return Question(f"point at the {asked}", f"x{x} y{y}", question_type, POINTING[question_type], box)


def ask_place(rng: np.random.Generator, sample: Sample, question_type: str) -> Question | None:
    """A question with a place in it, about a scene or a page; None where nothing stands alone."""
    alone = unique(sample.marks)
    if question_type == "point_color":
        inks = [mark.ink for mark in sample.marks]
        alone = [mark for mark in sample.marks if inks.count(mark.ink) == 1]
    if question_type == "what_at":
        mark = pick(rng, sample.marks)
        x, y = place(mark, sample.size)
        return Question(f"what is at x{x} y{y} ?", mark.kind, question_type, POINTING[question_type])
    if not alone:
        return None
    mark = pick(rng, alone)
    asked = f"{mark.ink} one" if question_type == "point_color" else mark.kind
    return _pointing(mark, sample.size, asked, question_type)


TYPES = QUESTION_TYPES
