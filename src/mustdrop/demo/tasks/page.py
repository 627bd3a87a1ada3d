"""Pages: lines, forms and tables of handwritten digits and printed letters."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mustdrop.demo.drawing import COLOURS, DIGITS, background, to_uint8
from mustdrop.demo.lettering import CHARACTERS, LETTERS, character_mask, number_of_fonts
from mustdrop.demo.tasks.common import Mark, Question, Sample, in_split, pick, put, sizes, unique

SIZES = sizes(80, 240, 150)
LAYOUTS = ("lines", "form", "table")
DARK_INKS = ("black", "red", "green", "blue", "magenta")  # that can be read on light paper
ABILITY = {
    "read_ink": "reading", "read_place": "reading", "read_field": "reading", "follows": "reading",
    "larger": "reading", "cell": "position", "row": "position", "higher": "position", "ink": "attributes",
    "exist": "attributes", "count": "counting", "lines": "counting",
}  # fmt: skip


@dataclass(frozen=True)
class Page:
    """Which layout, and its lines: a key (of a form or a table's row) or None, and what follows it."""

    layout: str
    lines: tuple[tuple[Mark | None, tuple[Mark, ...]], ...]
    columns: tuple[Mark, ...] = ()


class _Writer:
    """Writes characters of one font and size on one paper."""

    def __init__(self, rng: np.random.Generator, split: str, height: int, width: int) -> None:
        self.rng, self.split = rng, split
        self.light = bool(rng.random() < 0.5)
        self.canvas = background(rng, height, width)
        if self.light:
            self.canvas = 1.0 - 0.35 * self.canvas
        self.font = int(rng.integers(number_of_fonts(split)))
        self.inks = [str(ink) for ink in rng.permutation(DARK_INKS if self.light else list(COLOURS))]
        self.size = int(rng.integers(13, 18))
        self.pitch = max(16, self.size + int(rng.integers(1, 5)))
        self.spacing = self.size + int(rng.integers(3, 9))
        self.marks: list[Mark] = []

    def write(self, character: str, ink: str, top: int, left: int) -> Mark:
        mask = character_mask(self.rng, character, self.size, self.font, self.split)
        mark = replace(put(self.rng, self.canvas, mask, ink, top, left), kind=character)
        self.marks.append(mark)
        return mark

    def rule(self, top: int, left: int, bottom: int, right: int) -> None:
        """The outline of a rectangle."""
        shade = np.float32(0.3 if self.light else 0.7)
        lines: list[NDArray[np.float32]] = [
            self.canvas[top, left : right + 1], self.canvas[bottom, left : right + 1],
            self.canvas[top : bottom + 1, left], self.canvas[top : bottom + 1, right],
        ]  # fmt: skip
        for line in lines:
            line[:] = shade


def _characters(rng: np.random.Generator, number: int) -> list[str]:
    """Characters, half of them digits, one of which may come several times."""
    chosen = [pick(rng, DIGITS) if rng.random() < 0.5 else pick(rng, LETTERS) for _ in range(number)]
    again = pick(rng, chosen)
    for index in rng.permutation(number)[: int(rng.integers(0, 4))]:
        chosen[int(index)] = again
    return chosen


def _lines(w: _Writer, lengths: tuple[int, ...], one_ink: bool) -> Page:
    rng, (height, width) = w.rng, w.canvas.shape[:2]
    text = iter(_characters(rng, sum(lengths)))
    top = int(rng.integers(2, height - (len(lengths) - 1) * w.spacing - w.size - 1))
    lines = []
    for row, length in enumerate(lengths):
        left = int(rng.integers(2, width - (length - 1) * w.pitch - w.size - 1))
        ink = w.inks[0] if one_ink else w.inks[row]
        here = top + row * w.spacing
        lines.append((None, tuple(w.write(next(text), ink, here, left + i * w.pitch) for i in range(length))))
    return Page("lines", tuple(lines))


def _form(w: _Writer, lengths: tuple[int, ...], boxed: bool) -> Page:
    rng, (height, width) = w.rng, w.canvas.shape[:2]
    keys = [str(key) for key in rng.permutation(list(LETTERS))[: len(lengths)]]
    top = int(rng.integers(3, height - (len(lengths) - 1) * w.spacing - w.size - 3))
    gap = w.pitch + int(rng.integers(4, 12))
    left = int(rng.integers(2, width - gap - (max(lengths) - 1) * w.pitch - w.size - 3))
    lines = []
    for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
        here, start = top + row * w.spacing, left + gap
        if boxed:
            w.rule(here - 2, start - 3, here + w.size + 1, start + (length - 1) * w.pitch + w.size + 2)
        first = w.write(key, w.inks[0], here, left)
        value = tuple(w.write(pick(rng, DIGITS), w.inks[1], here, start + i * w.pitch) for i in range(length))
        lines.append((first, value))
    return Page("form", tuple(lines))


def _table(w: _Writer, rows: int, columns: int) -> Page:
    rng, (height, width) = w.rng, w.canvas.shape[:2]
    names = [str(name) for name in rng.permutation(list(LETTERS))[: rows + columns]]
    across, down = w.pitch + int(rng.integers(2, 6)), w.spacing
    top = int(rng.integers(3, height - rows * down - w.size - 3))
    left = int(rng.integers(3, width - columns * across - w.size - 3))
    heads = tuple(w.write(name, w.inks[0], top, left + (i + 1) * across) for i, name in enumerate(names[:columns]))
    ruled = rng.random() < 0.6
    cells = iter(_characters(rng, rows * columns))
    lines = []
    for row, name in enumerate(names[columns:]):
        here = top + (row + 1) * down
        if ruled:
            w.rule(here - 2, left - 2, here + w.size + 1, left + columns * across + w.size + 1)
        key = w.write(name, w.inks[0], here, left)
        values = tuple(w.write(next(cells), w.inks[1], here, left + (i + 1) * across) for i in range(columns))
        lines.append((key, values))
    return Page("table", tuple(lines), heads)


def draw(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Sample:
    """A page.  Its layout (size, kind, length of each line) belongs to the split."""
    height, width = size
    w = _Writer(rng, split, height, width)
    most = min(5, (height - 8) // w.spacing)
    wide = min(5, (width - 8) // w.pitch)
    while True:
        layout = pick(rng, LAYOUTS)
        number = int(rng.integers(2, most + 1))
        if layout == "table":
            columns = int(rng.integers(2, max(3, min(5, (width - 8 - w.size) // (w.pitch + 5)) + 1)))
            lengths: tuple[int, ...] = (min(number, most - 1), columns)
            if lengths[0] < 1 or columns * (w.pitch + 5) + w.size + 7 > width:
                continue
        elif layout == "form":
            single = bool(rng.random() < 0.4)
            top = 1 if single else max(1, min(3, wide - 2))
            lengths = tuple(int(rng.integers(1, top + 1)) for _ in range(number))
            if (max(lengths) - 1) * w.pitch + w.size + w.pitch + 12 + 6 > width:
                continue
        else:
            lengths = tuple(int(rng.integers(min(2, wide), wide + 1)) for _ in range(number))
        if in_split(split, "page", size, layout, lengths):
            break
    if layout == "table":
        page = _table(w, *lengths)
    elif layout == "form":
        page = _form(w, lengths, bool(rng.random() < 0.5))
    else:
        page = _lines(w, lengths, bool(rng.random() < 0.3))
    return Sample("pages", (to_uint8(w.canvas),), tuple(w.marks), page)


def _text(marks: tuple[Mark, ...]) -> str:
    return " ".join(mark.kind for mark in marks)


def ask(rng: np.random.Generator, sample: Sample, question_type: str) -> Question | None:
    """A random question of one type; None where the page admits none."""
    page: Page = sample.facts
    made = _reading(rng, sample, page, question_type) or _finding(rng, sample, page, question_type)
    return None if made is None else Question(*made, question_type, ABILITY[question_type])


def _reading(rng: np.random.Generator, sample: Sample, page: Page, name: str) -> tuple[str, str] | None:
    lines = [line for _, line in page.lines]
    if name == "read_ink" and page.layout == "lines" and len({line[0].ink for line in lines}) > 1:
        line = pick(rng, lines)
        return f"read the {line[0].ink} line", _text(line)
    if name == "read_place" and page.layout == "lines":
        where = pick(rng, ("top", "bottom"))
        return f"read the {where} line", _text(lines[0 if where == "top" else -1])
    if name == "read_field" and page.layout == "form":
        key, line = pick(rng, page.lines)
        return f"read {key.kind}", _text(line)
    if name == "follows" and page.layout == "lines":
        alone = unique(sample.marks)
        pairs = [(one, two) for line in lines for one, two in itertools.pairwise(line) if one in alone]
        if pairs:
            one, two = pick(rng, pairs)
            return f"what follows {one.kind} ?", two.kind
    if name == "larger" and page.layout == "form" and all(len(line) == 1 for line in lines):
        one, two = (page.lines[int(i)] for i in rng.permutation(len(lines))[:2])
        if one[0] and two[0] and one[1][0].kind != two[1][0].kind:
            larger = one if int(one[1][0].kind) > int(two[1][0].kind) else two
            return f"which is larger , {one[0].kind} or {two[0].kind} ?", larger[0].kind  # type: ignore[union-attr]
    return None


def _finding(rng: np.random.Generator, sample: Sample, page: Page, name: str) -> tuple[str, str] | None:
    marks, alone = sample.marks, unique(sample.marks)
    if page.layout == "table" and name in ("cell", "row"):
        key, line = pick(rng, page.lines)
        if name == "cell":
            column = int(rng.integers(len(line)))
            return f"what is in row {key.kind} column {page.columns[column].kind} ?", line[column].kind
        known = [(key, mark) for key, line in page.lines for mark in line if mark in alone]
        if known:
            key, mark = pick(rng, known)
            return f"in which row is the {mark.kind} ?", key.kind
    if name == "higher" and len(alone) > 1:
        one, two = (alone[int(i)] for i in rng.permutation(len(alone))[:2])
        if abs(one.top - two.top) >= 8:
            return f"which is higher , {one.kind} or {two.kind} ?", (one if one.top < two.top else two).kind
    if name == "ink" and alone:
        mark = pick(rng, alone)
        return f"what color is the {mark.kind} ?", mark.ink
    if name in ("exist", "count"):
        shown = [mark.kind for mark in marks]
        repeated = [kind for kind in shown if shown.count(kind) > 1]
        kind = pick(rng, repeated if repeated and name == "count" and rng.random() < 0.6 else shown)
        if rng.random() < (0.5 if name == "exist" else 0.15):
            kind = pick(rng, [other for other in CHARACTERS if other not in shown])
        if name == "exist":
            return f"is there a {kind} ?", "yes" if kind in shown else "no"
        return f"how many {kind} are there ?", str(shown.count(kind))
    if name == "lines" and page.layout != "table":
        return "how many lines are there ?", str(len(page.lines))
    return None
