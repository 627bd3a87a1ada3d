"""Scenes with handwritten digits, and questions about them, for the demo model.

A scene is a 192 x 192 picture: a muted background and four to eight objects, at most one in each cell of a
3 x 3 grid and no two of one colour.  An object is a handwritten digit (from the UCI optical digits data) or a
plain shape.  The digit images are split three ways, so a held-out scene shows digits that the model was never
trained on.

Only numpy is needed here.  A scene depends on nothing but the split and the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mustdrop.demo.drawing import (
    COLOURS,
    DIGITS,
    IMAGE_SIZE,
    KINDS,
    SHAPES,
    SPLITS,
    background,
    object_mask,
    paint,
    to_uint8,
)

__all__ = [
    "CELLS",
    "COLOURS",
    "DIGITS",
    "GRID",
    "IMAGE_SIZE",
    "KINDS",
    "PATCH_SIZE",
    "QUESTION_TYPES",
    "REGIONS",
    "SHAPES",
    "SPLITS",
    "WORDS",
    "Question",
    "Scene",
    "SceneMaker",
    "SceneObject",
    "ask",
    "random_kind",
]

PATCH_SIZE = 8  # pixels
GRID = IMAGE_SIZE // PATCH_SIZE  # 24 x 24 = 576 patches, as many as LLaVA-1.5 has
CELLS = 3  # objects lie on a 3 x 3 grid of cells
CELL_SIZE = IMAGE_SIZE // CELLS

REGIONS = (
    "top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right",
)  # fmt: skip

#: Every word the model knows; a word's place is its token id.
WORDS = (
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", "?",
    "what", "digit", "digits", "is", "are", "there", "a", "the", "one", "at", "color", "many", "how", "where",
    "describe", "yes", "no", "nothing",
    *REGIONS,
    *KINDS,
    *COLOURS,
)  # fmt: skip
QUESTION_TYPES = (
    "color2digit", "digit2color", "region2obj", "region2color", "locate", "exist", "count", "describe",
)  # fmt: skip

DIGIT_SHARE = 0.78  # of the objects; the rest are shapes
EMPTY_SHARE = 0.15  # of the questions about a region; these ask about one with nothing in it


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is, its colour, its cell (0-8, row by row) and its bounding square in pixels."""

    kind: str
    colour: str
    cell: int
    top: int
    left: int
    size: int

    @property
    def is_digit(self) -> bool:
        """Whether the object is a digit rather than a shape."""
        return self.kind in DIGITS

    @property
    def region(self) -> str:
        """The word for the object's cell, such as ``"top-left"``."""
        return REGIONS[self.cell]


@dataclass(frozen=True)
class Scene:
    """A picture (uint8, height x width x 3) and the objects in it."""

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]

    def patches(self, obj: SceneObject) -> NDArray[np.int64]:
        """Indices (row by row, 0-575, ascending) of the patches that an object's bounding square touches."""
        rows = np.arange(obj.top // PATCH_SIZE, (obj.top + obj.size - 1) // PATCH_SIZE + 1)
        columns = np.arange(obj.left // PATCH_SIZE, (obj.left + obj.size - 1) // PATCH_SIZE + 1)
        return (rows[:, None] * GRID + columns).ravel()


@dataclass(frozen=True)
class Question:
    """A question about one scene, its only right answer, and which of `QUESTION_TYPES` it is."""

    text: str
    answer: str
    type: str


def random_kind(rng: np.random.Generator, digit_share: float = DIGIT_SHARE) -> str:
    """A digit or, less often, a shape."""
    names = DIGITS if rng.random() < digit_share else SHAPES
    return names[rng.integers(len(names))]


def _unique(objects: tuple[SceneObject, ...]) -> list[SceneObject]:
    """The objects of which there is only one of their kind."""
    kinds = [obj.kind for obj in objects]
    return [obj for obj in objects if kinds.count(obj.kind) == 1]


def ask(rng: np.random.Generator, objects: tuple[SceneObject, ...], question_type: str) -> Question | None:
    """A random question of one type; None where these objects admit none (no digit, or no unique kind)."""

    def pick(among: list[SceneObject] | tuple[SceneObject, ...]) -> SceneObject:
        return among[rng.integers(len(among))]

    digits = [obj for obj in objects if obj.is_digit]
    if question_type == "color2digit":
        if not digits:
            return None
        obj = pick(digits)
        text, answer = f"what digit is {obj.colour} ?", obj.kind
    elif question_type == "digit2color":
        unique = _unique(objects)
        if not unique:
            return None
        obj = pick(unique)
        text, answer = f"what color is the {obj.kind} ?", obj.colour
    elif question_type in ("region2obj", "region2color"):
        by_cell = {obj.cell: obj for obj in objects}
        empty = [cell for cell in range(CELLS * CELLS) if cell not in by_cell]
        ask_empty = bool(empty) and rng.random() < EMPTY_SHARE
        cell = empty[rng.integers(len(empty))] if ask_empty else pick(objects).cell
        wanted = "kind" if question_type == "region2obj" else "colour"
        text = f"what is at {REGIONS[cell]} ?" if wanted == "kind" else f"what color is at {REGIONS[cell]} ?"
        answer = getattr(by_cell[cell], wanted) if cell in by_cell else "nothing"
    elif question_type == "locate":
        obj = pick(objects)
        text, answer = f"where is the {obj.colour} one ?", obj.region
    elif question_type == "exist":
        present = {obj.kind for obj in objects}
        absent = [kind for kind in KINDS if kind not in present]
        yes = rng.random() < 0.5
        kind = pick(objects).kind if yes else absent[rng.integers(len(absent))]
        text, answer = f"is there a {kind} ?", "yes" if yes else "no"
    elif question_type == "count":
        text, answer = "how many digits are there ?", str(len(digits))
    elif question_type == "describe":
        obj = pick(objects)
        text, answer = f"describe the {obj.colour} one", f"a {obj.colour} {obj.kind} at {obj.region}"
    else:
        raise ValueError(f"unknown question type {question_type!r}; choose one of {QUESTION_TYPES}")
    return Question(text, answer, question_type)


class SceneMaker:
    """Makes scenes, and questions about them, from the digits of one split.

    The same split and seed give the same sequence of scenes, whatever is asked about them in between.
    """

    def __init__(self, split: str, seed: int) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {SPLITS}")
        self.split = split
        entropy = (seed, SPLITS.index(split))
        self._scene_rng = np.random.default_rng((*entropy, 0))
        self._question_rng = np.random.default_rng((*entropy, 1))

    def scene(self) -> Scene:
        """The next scene.  It has a digit and a kind that occurs once, so every question has an answer."""
        rng = self._scene_rng
        canvas = background(rng)
        cells = rng.permutation(CELLS * CELLS)[: rng.integers(4, 9)]
        colours = rng.permutation(list(COLOURS))[: len(cells)]
        kinds = _random_kinds(rng, len(cells))
        objects = []
        for kind, colour, cell in zip(kinds, colours.tolist(), cells.tolist(), strict=True):
            mask = object_mask(rng, kind, self.split)
            # One pixel of every cell's rim stays free, so that neighbours never touch.
            top, left = (CELL_SIZE * side + int(rng.integers(1, CELL_SIZE - len(mask))) for side in divmod(cell, CELLS))
            paint(rng, canvas, mask, colour, top, left)
            objects.append(SceneObject(kind, colour, cell, top, left, len(mask)))
        return Scene(to_uint8(canvas), tuple(objects))

    def question(self, scene: Scene, question_type: str) -> Question:
        """A random question of one type about a scene of this maker."""
        question = ask(self._question_rng, scene.objects, question_type)
        if question is None:
            raise ValueError(f"no question of type {question_type!r} can be asked about this scene")
        return question

    def questions(self, scene: Scene) -> list[Question]:
        """One question of every type, in the order of `QUESTION_TYPES`."""
        return [self.question(scene, question_type) for question_type in QUESTION_TYPES]


def _random_kinds(rng: np.random.Generator, number: int) -> list[str]:
    """Kinds for the objects of one scene: the first is a digit, and at least one kind occurs only once."""
    while True:
        kinds = [random_kind(rng, 1.0), *(random_kind(rng) for _ in range(number - 1))]
        if any(kinds.count(kind) == 1 for kind in kinds):
            return kinds
