"""Draws the characters of the demo's pages: capital letters of free fonts, and handwritten digits.

The letters are bundled as small pictures (`letters.npz`), so that neither fonts nor a renderer are needed here.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mustdrop.demo.drawing import DIGITS, SPLITS, digit_images, warp

#: Letters that are hard to tell from a digit, or from each other, are left out.
LETTERS = tuple("ABCDEFGHJKLMNPRTUVWXY")
CHARACTERS = (*DIGITS, *LETTERS)
GLYPH = 24  # pixels of a bundled letter


class LetterData(NamedTuple):
    """The bundled letters: pictures (fonts, letters, 24, 24; uint8, 0-15), split and family of each font."""

    images: NDArray[np.uint8]
    split: NDArray[np.uint8]
    family: NDArray[np.str_]


@lru_cache(maxsize=1)
def letter_data() -> LetterData:
    """The letters of all fonts, with their fixed split by family."""
    with np.load(Path(__file__).with_name("letters.npz")) as stored:
        return LetterData(stored["images"], stored["split"], stored["family"])


@lru_cache(maxsize=len(SPLITS))
def _fonts(split: str) -> NDArray[np.float64]:
    """Letters (fonts, letters, 24, 24) of one split, scaled to 0-1."""
    data = letter_data()
    fonts: NDArray[np.float64] = data.images[data.split == SPLITS.index(split)] / 15.0
    return fonts


def number_of_fonts(split: str) -> int:
    """How many font files a split has."""
    return len(_fonts(split))


def character_mask(rng: np.random.Generator, character: str, size: int, font: int, split: str) -> NDArray[np.float32]:
    """The opacity (0-1) of one character, `size` pixels high and wide: a letter of a font, or somebody's digit."""
    turn, shear = 0.04 * rng.standard_normal(2)
    matrix = np.array([[1.0, shear - turn], [turn, 1.0]])
    if character in DIGITS:
        images = digit_images(split)[int(character)]
        image = images[rng.integers(len(images))]
        return np.clip(1.25 * warp(image, matrix, size), 0, 1).astype(np.float32)
    return warp(_fonts(split)[font, LETTERS.index(character)], matrix, size).astype(np.float32)
