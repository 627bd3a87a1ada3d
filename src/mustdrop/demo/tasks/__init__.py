"""What the second demo model is asked: pages, scenes, places, videos, and what changed between two pictures.

Only numpy is needed.  What a maker draws and asks depends on nothing but the kind, the split and the seed, and splits
share neither fonts nor digits nor layouts.
"""

from __future__ import annotations

import numpy as np

from mustdrop.demo.drawing import SPLITS
from mustdrop.demo.tasks import clip, page, pair, scene
from mustdrop.demo.tasks.common import ABILITIES, BINS, KINDS, WORDS, Mark, Question, Sample, pick

__all__ = [
    "ABILITIES",
    "ABILITY",
    "BINS",
    "KINDS",
    "LEARNED",
    "SPLITS",
    "TYPES",
    "WORDS",
    "Mark",
    "Question",
    "Sample",
    "TaskMaker",
]

#: The ability that each type of question of a kind asks for.
ABILITY: dict[str, dict[str, str]] = {
    "pages": page.ABILITY,
    "scenes": scene.ABILITY,
    "grounding": scene.POINTING,
    "videos": clip.ABILITY,
    "changes": pair.ABILITY,
}
TYPES = {kind: tuple(abilities) for kind, abilities in ABILITY.items()}
#: The types of question of which the bundled model answers at least nine of ten rightly, on the selection split (350
#: questions of each kind, seed 9): benchmarks ask it no others. Its card lists the others with their scores.
LEARNED: dict[str, tuple[str, ...]] = {
    "pages": ("read_place", "read_field", "follows", "cell", "row", "higher", "ink", "exist"),
    "scenes": ("color2digit", "digit2color", "region2obj", "region2color", "locate", "exist", "describe"),
    "grounding": ("point_color", "point_kind", "what_at"),
    "videos": ("first", "last", "tint"),
    "changes": ("color_then", "digit_then"),
}
_SIZES = {
    "pages": page.SIZES,
    "scenes": scene.SIZES,
    "grounding": scene.SIZES,
    "videos": clip.SIZES,
    "changes": pair.SIZES,
}
_ASK = {"pages": page.ask, "scenes": scene.ask, "grounding": scene.ask_place, "videos": clip.ask, "changes": pair.ask}


class TaskMaker:
    """Makes samples of one kind, and questions about them, from the fonts, digits and layouts of one split.

    The same kind, split and seed give the same sequence of samples, whatever is asked about them in between.
    """

    def __init__(self, kind: str, split: str, seed: int) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; choose one of {KINDS}")
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose one of {SPLITS}")
        self.kind, self.split = kind, split
        entropy = (seed, SPLITS.index(split), KINDS.index(kind), 77)
        self._sample_rng = np.random.default_rng((*entropy, 0))
        self._question_rng = np.random.default_rng((*entropy, 1))

    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths (pixels) of this kind's pictures."""
        return _SIZES[self.kind]

    def sample(self, size: tuple[int, int] | None = None, moments: int | None = None) -> Sample:
        """The next sample, of a given size (and number of moments of a video) or of any."""
        rng = self._sample_rng
        size = size or pick(rng, self.sizes())
        if self.kind == "pages":
            return page.draw(rng, self.split, size)
        if self.kind == "videos":
            return clip.draw(rng, self.split, size, moments or pick(rng, clip.MOMENTS))
        if self.kind == "changes":
            return pair.draw(rng, self.split, size)
        if self.kind == "grounding" and rng.random() < 0.5:
            return page.draw(rng, self.split, size)
        return scene.draw(rng, self.split, size)

    def question(self, sample: Sample, question_type: str) -> Question | None:
        """A random question of one type; None where this sample admits none of it."""
        if question_type not in TYPES[self.kind]:
            raise ValueError(f"unknown question type {question_type!r}; choose one of {TYPES[self.kind]}")
        return _ASK[self.kind](self._question_rng, sample, question_type)

    def questions(self, sample: Sample) -> list[Question]:
        """One question of every type that the sample admits."""
        made = [self.question(sample, name) for name in TYPES[self.kind]]
        return [question for question in made if question is not None]
