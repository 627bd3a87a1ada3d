"""Draws what the demo scenes are made of: backgrounds, handwritten digits and plain shapes.

Only numpy is needed, and every random choice comes from the generator that is passed in.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 192  # pixels

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.93, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.22, 0.35, 1.0),
    "yellow": (0.95, 0.90, 0.15),
    "cyan": (0.15, 0.88, 0.92),
    "magenta": (0.92, 0.20, 0.88),
    "orange": (1.0, 0.55, 0.08),
    "white": (0.97, 0.97, 0.97),
}
DIGITS = tuple(str(digit) for digit in range(10))
SHAPES = ("disk", "square", "triangle")
KINDS = (*DIGITS, *SHAPES)
SPLITS = ("train", "selection", "heldout")


class DigitData(NamedTuple):
    """The bundled digits: images (uint8, 0-16), labels, and the index into `SPLITS` of each image."""

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    split: NDArray[np.uint8]


@lru_cache(maxsize=1)
def digit_data() -> DigitData:
    """The 1797 handwritten digits with their fixed split."""
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        return DigitData(stored["images"], stored["labels"], stored["split"])


@lru_cache(maxsize=len(SPLITS))
def digit_images(split: str) -> tuple[NDArray[np.float64], ...]:
    """For each digit 0-9, the images (n, 8, 8) of one split, scaled to 0-1."""
    data = digit_data()
    member = data.split == SPLITS.index(split)
    return tuple(data.images[member & (data.labels == digit)] / 16.0 for digit in range(10))


def _resampling(source: int, target: int) -> NDArray[np.float64]:
    """Matrix (target, source) that enlarges a signal, with smooth-step weights between its samples."""
    position = np.linspace(0, source - 1, target)
    low = np.minimum(position.astype(int), source - 2)
    weight = position - low
    weight = weight * weight * (3 - 2 * weight)
    matrix = np.zeros((target, source))
    matrix[np.arange(target), low] = 1 - weight
    matrix[np.arange(target), low + 1] = weight
    return matrix


def background(rng: np.random.Generator, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> NDArray[np.float32]:
    """A muted picture (0-0.6) without objects: a gradient of dull colours, soft blobs and a little noise."""
    start, end = (0.05 + 0.35 * rng.random() + 0.10 * (rng.random(3) - 0.5) for _ in range(2))
    angle = rng.random() * 2 * np.pi
    rows, columns = np.linspace(-1, 1, height), np.linspace(-1, 1, width)
    ramp = (np.cos(angle) * columns + np.sin(angle) * rows[:, None]) * 0.5 + 0.5
    ramp = np.clip(ramp, 0, 1)[..., None]
    picture = start * (1 - ramp) + end * ramp
    texture = 0.015 * rng.standard_normal((height, width))
    if rng.random() > 0.4:
        size = int(rng.integers(3, 9))
        blobs = rng.standard_normal((size, size))
        texture += 0.06 * _resampling(size, height) @ blobs @ _resampling(size, width).T
    muted: NDArray[np.float32] = np.clip(picture + texture[..., None], 0, 0.6).astype(np.float32)
    return muted


def warp(image: NDArray[np.float64], matrix: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Samples a square image, bilinearly, at `matrix` times the coordinates (-1 to 1) of a new picture."""
    source = len(image)
    padded = np.pad(image, 1)  # a ring of zeros stands for everything outside
    axis = (2 * np.arange(size) + 1) / size - 1
    x, y = axis[None, :], axis[:, None]
    column, row = (np.clip(((a * x + b * y + 1) * source - 1) / 2 + 1, 0, source + 1 - 1e-9) for a, b in matrix)
    top, left = row.astype(int), column.astype(int)
    down, right = row - top, column - left
    upper = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    lower = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    sampled: NDArray[np.float64] = upper * (1 - down) + lower * down
    return sampled


def _digit_mask(rng: np.random.Generator, image: NDArray[np.float64]) -> NDArray[np.float32]:
    """One digit, enlarged to 15-22 pixels, slightly turned, sheared and stretched."""
    size = int(rng.integers(15, 23))
    angle, shear, stretch_x, stretch_y = rng.standard_normal(4) * (0.10, 0.10, 0.07, 0.07)
    matrix = 0.9 * np.array(
        [
            [np.cos(angle) * (1 + stretch_x), -np.sin(angle) + shear],
            [np.sin(angle), np.cos(angle) * (1 + stretch_y)],
        ]
    )
    return np.clip(1.25 * warp(np.pad(image, 1), matrix, size), 0, 1).astype(np.float32)


def _shape_mask(rng: np.random.Generator, kind: str) -> NDArray[np.float32]:
    """A disk, square or triangle of 14-20 pixels."""
    size = int(rng.integers(14, 21))
    axis = np.arange(size) + 0.5
    x, y, middle = axis[None, :], axis[:, None], size / 2
    mask = np.zeros((size, size), np.float32)
    if kind == "disk":
        mask[:] = np.clip(middle - np.hypot(y - middle, x - middle), 0, 1)
    elif kind == "triangle":
        mask[:] = (np.abs(x - middle) < y / 2) & (y < size - 1)
    else:
        mask[1:-1, 1:-1] = 1
    return mask


def object_mask(rng: np.random.Generator, kind: str, split: str) -> NDArray[np.float32]:
    """The opacity (0-1) of one object's bounding square; digits are drawn from the handwriting of `split`."""
    if kind in SHAPES:
        return _shape_mask(rng, kind)
    images = digit_images(split)[int(kind)]
    return _digit_mask(rng, images[rng.integers(len(images))])


def paint(
    rng: np.random.Generator,
    canvas: NDArray[np.float32],
    mask: NDArray[np.float32],
    colour: str,
    top: int,
    left: int,
) -> None:
    """Blends an object into the canvas, in a shade that differs a little from object to object."""
    shade = np.clip(COLOURS[colour] + rng.normal(0, 0.03, 3), 0, 1).astype(np.float32)
    under = canvas[top : top + len(mask), left : left + len(mask)]
    under += (shade - under) * mask[..., None]


def to_uint8(canvas: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A picture in 0-1 as bytes."""
    picture: NDArray[np.uint8] = np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)
    return picture
