"""What the demo's tasks share: marks on pictures, questions, words, sizes, and which layouts belong to which split."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mustdrop.demo.drawing import COLOURS, DIGITS, SHAPES, SPLITS, object_mask, paint
from mustdrop.demo.lettering import CHARACTERS
from mustdrop.demo.scenes import REGIONS

KINDS = ("pages", "scenes", "grounding", "videos", "changes")
ABILITIES = ("reading", "counting", "attributes", "position", "time", "change")
BINS = 32  # a place is said by two words, such as "x7 y20", of a grid of 32 x 32 over the picture
UNIT = 16  # pixels: what one vision token covers, both ways
INKS = (*COLOURS, "black")
THINGS = (*CHARACTERS, *SHAPES)
BLACK = (0.06, 0.06, 0.06)

PLACES = (*(f"x{i}" for i in range(BINS)), *(f"y{i}" for i in range(BINS)))

#: Every word the model knows; a word's place is its token id.
WORDS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<unk>", "user", "assistant", "<", ".", "seconds>", "?", ",", "what", "which", "how", "where",
    "when", "is", "are", "there", "a", "an", "the", "one", "in", "at", "of", "or", "to", "many", "often", "color",
    "read", "line", "lines", "row", "column", "follows", "digits", "digit", "describe", "point", "larger", "higher",
    "comes", "come", "does", "go", "first", "last", "picture", "changed", "new", "gone", "place", "up", "down",
    "nowhere", "yes", "no", "nothing",
    *REGIONS, *THINGS, *INKS, *PLACES,
)  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """Something drawn: what it is, its ink, its bounding box in pixels, and the picture (or frame) it is in."""

    kind: str
    ink: str
    top: int
    left: int
    height: int
    width: int
    picture: int = 0


@dataclass(frozen=True)
class Sample:
    """Something to ask about.

    Attributes:
        kind: one of `KINDS`.
        pictures: pictures (uint8, height x width x 3), all of one size; of a video, its frames.
        marks: everything drawn.
        facts: what the questions of this kind need to know.
        video: whether the pictures are frames of one video.
    """

    kind: str
    pictures: tuple[NDArray[np.uint8], ...]
    marks: tuple[Mark, ...]
    facts: Any
    video: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.pictures[0].shape[:2]
        return height, width


@dataclass(frozen=True)
class Question:
    """A question, its answer, which type it is and which ability it asks for.

    `box` (top, left, bottom, right; shares of the picture) is set where any place within it is right.
    """

    text: str
    answer: str
    type: str
    ability: str
    box: tuple[float, float, float, float] | None = None

    def right(self, said: str) -> bool:
        """Whether an answer is right: word for word, or a place within the box."""
        if self.box is None:
            return said.split() == self.answer.split()
        words = said.split()
        if len(words) != 2 or words[0] not in PLACES[:BINS] or words[1] not in PLACES[BINS:]:
            return False
        x, y = ((int(word[1:]) + 0.5) / BINS for word in words)
        top, left, bottom, right = self.box
        return left <= x <= right and top <= y <= bottom


def place(mark: Mark, size: tuple[int, int]) -> tuple[int, int]:
    """Bins (x, y) of a mark's middle."""
    x = BINS * (mark.left + mark.width / 2) / size[1]
    y = BINS * (mark.top + mark.height / 2) / size[0]
    return min(int(x), BINS - 1), min(int(y), BINS - 1)


def in_split(split: str, *layout: object) -> bool:
    """Whether a layout belongs to a split: seven tenths of all train, one is for selection, two are held out."""
    return SPLITS[(0, 0, 0, 0, 0, 0, 0, 1, 2, 2)[zlib.crc32(repr(layout).encode()) % 10]] == split


def pick(rng: np.random.Generator, among: Sequence[Any]) -> Any:
    """One of them."""
    return among[int(rng.integers(len(among)))]


def put(
    rng: np.random.Generator, canvas: NDArray[np.float32], mask: NDArray[np.float32], ink: str, top: int, left: int
) -> Mark:
    """Paints something, and says where."""
    if ink == "black":
        shade = np.clip(BLACK + rng.normal(0, 0.02, 3), 0, 1).astype(np.float32)
        under = canvas[top : top + len(mask), left : left + len(mask)]
        under += (shade - under) * mask[..., None]
    else:
        paint(rng, canvas, mask, ink, top, left)
    return Mark("", ink, top, left, len(mask), len(mask))


def unique(marks: Sequence[Mark]) -> list[Mark]:
    """The marks of which there is only one of their kind."""
    kinds = [mark.kind for mark in marks]
    return [mark for mark in marks if kinds.count(mark.kind) == 1]


def sizes(low: int, high: int, area: int) -> tuple[tuple[int, int], ...]:
    """All heights and widths, multiples of 16 pixels, from `low` to `high` and of at most `area` vision tokens."""
    sides = range(low // UNIT, high // UNIT + 1)
    return tuple((UNIT * h, UNIT * w) for h in sides for w in sides if h * w <= area and max(h, w) <= 2 * min(h, w))


__all__ = ["COLOURS", "DIGITS", "SHAPES", "SPLITS", "object_mask"]
