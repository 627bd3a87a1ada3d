"""Videos: coloured digits that come, move and go."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mustdrop.demo.drawing import COLOURS, DIGITS, background, object_mask, to_uint8
from mustdrop.demo.tasks.common import Mark, Question, Sample, in_split, pick, put, sizes

SIZES = sizes(64, 112, 36)
MOMENTS = (3, 4, 5, 6)  # pairs of frames
FPS = 2.0  # frames a second, so a moment is a second
LANE = 26  # pixels
ABILITY = {
    "first": "time", "last": "time", "when": "time", "go": "time", "often": "counting", "tint": "attributes",
}  # fmt: skip


@dataclass(frozen=True)
class Actor:
    """A digit of a video: its colour, at which moments it is there, and where it goes."""

    kind: str
    ink: str
    there: tuple[bool, ...]
    goes: str

    @property
    def first(self) -> int:
        """The first moment it is there."""
        return self.there.index(True)

    @property
    def last(self) -> int:
        """The last moment it is there."""
        return len(self.there) - 1 - self.there[::-1].index(True)

    @property
    def often(self) -> int:
        """How often it comes."""
        return sum(now and not before for before, now in zip((False, *self.there), self.there, strict=False))


def _presence(rng: np.random.Generator, moments: int) -> tuple[bool, ...]:
    """Up to three spans of moments, of which the first may come late."""
    while True:
        there = rng.random(moments) < (0.5 if rng.random() < 0.5 else 0.8)
        there[: int(rng.integers(0, moments))] &= bool(rng.random() < 0.3)
        if there.any():
            return tuple(bool(x) for x in there)


def draw(rng: np.random.Generator, split: str, size: tuple[int, int], moments: int) -> Sample:
    """A video of one to three digits, each in a lane of its own."""
    height, width = size
    upright = bool(rng.random() < 0.5)
    across, along = (width, height) if upright else (height, width)
    most = min(3, across // LANE)
    while True:
        number = int(rng.integers(1, most + 1))
        presence = [_presence(rng, moments) for _ in range(number)]
        lanes = [int(lane) for lane in rng.permutation(across // LANE)[:number]]
        if in_split(split, "video", size, moments, upright, presence, lanes):
            break
    ground = background(rng, height, width)
    frames = [ground.copy() for _ in range(2 * moments)]
    kinds, inks = rng.permutation(list(DIGITS)), rng.permutation(list(COLOURS))
    actors, marks = [], []
    for there, lane, kind, ink in zip(presence, lanes, kinds, inks, strict=False):
        mask = object_mask(rng, str(kind), split)
        goes, path = _path(rng, there, upright, along - len(mask) - 2)
        actors.append(Actor(str(kind), str(ink), there, goes))
        side = lane * LANE + int(rng.integers(1, LANE - len(mask) + 1))
        shade_seed = int(rng.integers(2**32))
        for frame, canvas in enumerate(frames):
            if not there[frame // 2]:
                continue
            here = 1 + round(path[frame])
            top, left = (here, side) if upright else (side, here)
            mark = put(np.random.default_rng(shade_seed), canvas, mask, str(ink), top, left)
            marks.append(replace(mark, kind=str(kind), picture=frame))
    for canvas in frames:
        canvas += rng.normal(0, 0.01, canvas.shape[:2])[..., None].astype(np.float32)
    return Sample("videos", tuple(to_uint8(canvas) for canvas in frames), tuple(marks), tuple(actors), video=True)


def _path(rng: np.random.Generator, there: tuple[bool, ...], upright: bool, room: int) -> tuple[str, np.ndarray]:
    """Where something goes, and its place at each frame (pixels from the edge)."""
    frames = 2 * len(there)
    steps = np.flatnonzero(there)
    if rng.random() < 0.35 or steps[-1] - steps[0] < 1:
        return "nowhere", np.full(frames, rng.integers(0, room + 1))
    begin, end = 2 * int(steps[0]), 2 * int(steps[-1]) + 1
    length = min(room, int(rng.integers(20, room + 1)) if room > 20 else room)
    start = int(rng.integers(0, room - length + 1))
    way = start + length * np.clip((np.arange(frames) - begin) / (end - begin), 0, 1)
    forward = bool(rng.random() < 0.5)
    names = ("down", "up") if upright else ("right", "left")
    return names[0 if forward else 1], way if forward else room - way


def ask(rng: np.random.Generator, sample: Sample, question_type: str) -> Question | None:
    """A random question of one type; None where the video admits none."""
    actors: tuple[Actor, ...] = sample.facts
    actor = pick(rng, actors)
    if question_type in ("first", "last"):
        if len(actors) < 2:
            return None
        order = sorted(actors, key=lambda a: a.first if question_type == "first" else -a.last)
        when = [getattr(a, question_type) for a in order]
        if when[0] == when[1]:
            return None
        text, answer = f"which comes {question_type} ?", order[0].kind
    elif question_type == "when":
        text, answer = f"when does the {actor.kind} come ?", str(actor.first)
    elif question_type == "go":
        text, answer = f"where does the {actor.kind} go ?", actor.goes
    elif question_type == "often":
        text, answer = f"how often does the {actor.kind} come ?", str(actor.often)
    else:
        text, answer = f"what color is the {actor.kind} ?", actor.ink
    return Question(text, answer, question_type, ABILITY[question_type])


__all__ = ["Mark", "ask", "draw"]
