"""Trains the vision tower: from one object in a small window to whole scenes.

The tower is trained as CLIP's stand-in, before there is any language: each patch is asked what it shows, and
CLS for a caption of the scene (which kind of object has which colour), so that CLS attends to objects.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from network import VISION_WIDTH, WHOLE, Window, to_pixels, vision_features, vision_summary
from torch import Tensor, nn
from training import Metrics

from mustdrop.demo.drawing import background, object_mask, paint, to_uint8
from mustdrop.demo.scenes import (
    CELLS,
    COLOURS,
    GRID,
    KINDS,
    PATCH_SIZE,
    REGIONS,
    Scene,
    SceneMaker,
    SceneObject,
    random_kind,
)

NO_KIND, NO_COLOUR = len(KINDS), len(COLOURS)
IGNORE = -100
ONE_OBJECT, PACKED = 4, 12  # window sizes, in patches


class Batch(NamedTuple):
    """Pixels, and the kind (B, N) and colour (B, N) of each patch and the kind of each colour (B, 8)."""

    pixels: Tensor
    kind: Tensor
    colour: Tensor
    caption: Tensor


class Heads(nn.Module):
    """Linear read-outs to train the vision tower with; some start the projector, then all are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Linear(VISION_WIDTH, NO_KIND + 1)
        self.colour = nn.Linear(VISION_WIDTH, NO_COLOUR + 1)
        self.position = nn.Linear(VISION_WIDTH, 2)
        self.region = nn.Linear(VISION_WIDTH, len(REGIONS))
        self.caption = nn.Linear(VISION_WIDTH, NO_COLOUR * (NO_KIND + 1))


class WindowMaker:
    """Small windows of training scenes: several times more objects per patch than a whole scene has."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._backgrounds = [background(rng) for _ in range(100)]

    def window(self, size: int) -> Window:
        row, column = self._rng.integers(0, GRID - size + 1, 2).tolist()
        return Window(row, column, size)

    def scene(self, window: Window) -> Scene:
        """One object in a window of 32 pixels, three to eight in a larger one: one a square of 32 pixels."""
        rng, pixels, square = self._rng, window.size * PATCH_SIZE, 4 * PATCH_SIZE
        top, left = rng.integers(0, GRID * PATCH_SIZE - pixels + 1, 2)
        picture = self._backgrounds[rng.integers(len(self._backgrounds))]
        canvas = picture[top : top + pixels, left : left + pixels].copy()
        squares = (window.size * PATCH_SIZE // square) ** 2
        number = 1 if squares == 1 else int(rng.integers(3, 9))
        colours = rng.permutation(list(COLOURS))[:number].tolist()
        objects = []
        for colour, place in zip(colours, rng.permutation(squares)[:number].tolist(), strict=True):
            kind = random_kind(rng, 0.85)
            mask = object_mask(rng, kind, "train")
            row, column = divmod(place, pixels // square)
            y, x = (square * side + int(rng.integers(0, square - len(mask) + 1)) for side in (row, column))
            paint(rng, canvas, mask, colour, y, x)
            y, x = y + window.row * PATCH_SIZE, x + window.column * PATCH_SIZE
            objects.append(SceneObject(kind, colour, 0, y, x, len(mask)))  # the cell is not used here
        return Scene(to_uint8(canvas), tuple(objects))


def _cover(start: int, size: int, first: int, number: int) -> np.ndarray:
    """How many pixels of each of `number` patches, from `first` on, [start, start + size) covers."""
    edge = (first + np.arange(number)) * PATCH_SIZE
    return np.clip(np.minimum(edge + PATCH_SIZE, start + size) - np.maximum(edge, start), 0, None)


def targets(objects: tuple[SceneObject, ...], window: Window = WHOLE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kind and colour of each patch, and the kind of each colour.  Barely covered patches are ignored."""
    names = list(COLOURS)
    kind = np.full((window.size, window.size), NO_KIND)
    colour = np.full((window.size, window.size), NO_COLOUR)
    caption = np.full(NO_COLOUR, NO_KIND)
    for obj in objects:
        rows = _cover(obj.top, obj.size, window.row, window.size)
        columns = _cover(obj.left, obj.size, window.column, window.size)
        share = rows[:, None] * columns / PATCH_SIZE**2
        kind[share > 0] = colour[share > 0] = IGNORE
        kind[share >= 0.45] = KINDS.index(obj.kind)
        colour[share >= 0.45] = names.index(obj.colour)
        caption[names.index(obj.colour)] = KINDS.index(obj.kind)
    return kind.ravel(), colour.ravel(), caption


def batch(scenes: list[Scene], window: Window = WHOLE) -> Batch:
    rows = [targets(scene.objects, window) for scene in scenes]
    kind, colour, caption = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return Batch(to_pixels([scene.image for scene in scenes]), kind, colour, caption)


def _balanced(value: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Means over two sets, summed: the few object patches count as much as all the background."""
    return value[one].mean() + value[other].mean()


def loss_and_metrics(tower: nn.Module, heads: Heads, data: Batch, window: Window = WHOLE) -> tuple[Tensor, Metrics]:
    """The loss, and accuracies over object patches.

    Each patch must say its kind, colour, place and region; CLS the kind of each colour.  All terms weigh
    object patches apart from the background: with one mean over all patches, objects forget where they are.
    """
    hidden = vision_features(tower, data.pixels, window)
    patches = hidden[:, 1:]
    empty = data.kind == NO_KIND
    shown = (data.kind != IGNORE) & ~empty

    def entropy(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=IGNORE)

    index = window.patches()
    row, column = index // GRID, index % GRID
    place = torch.stack([row, column], -1).float() / (GRID / 2) - 1 + 1 / GRID
    region = (row * CELLS // GRID * CELLS + column * CELLS // GRID).expand(len(patches), -1)
    kind, regions = heads.kind(patches), heads.region(patches)
    caption = heads.caption(vision_summary(tower, hidden)).unflatten(-1, (NO_COLOUR, -1))
    content = entropy(kind, data.kind) + entropy(heads.colour(patches), data.colour)
    distance = (heads.position(patches) - place).square().sum(-1)
    described = data.caption != NO_KIND
    loss = (
        _balanced(content, shown, empty)
        + _balanced(distance + 0.5 * entropy(regions, region), shown, empty)
        + 0.5 * _balanced(entropy(caption, data.caption), described, ~described)
    )
    with torch.no_grad():
        metrics = {
            "kind": (kind.argmax(-1) == data.kind)[shown].float().mean().item(),
            "region": (regions.argmax(-1) == region)[shown].float().mean().item(),
            "empty": (kind.argmax(-1) == NO_KIND)[empty].float().mean().item(),
            "caption": (caption.argmax(-1) == data.caption)[described].float().mean().item(),
        }
    return loss, metrics


@torch.no_grad()
def selection_metrics(tower: nn.Module, heads: Heads, seed: int, batches: int = 8) -> Metrics:
    """Mean metrics over whole scenes with digits of the selection split."""
    maker = SceneMaker("selection", seed)
    rows = [loss_and_metrics(tower, heads, batch([maker.scene() for _ in range(16)]))[1] for _ in range(batches)]
    return {key: round(float(np.mean([row[key] for row in rows])), 4) for key in rows[0]}
