"""A trace as a picture: which patches each stage left, over the images and frames of one prompt."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mustdrop import figures
from mustdrop.errors import ConfigError
from mustdrop.extras import need
from mustdrop.pictures import frames_of, is_array, read_picture

if TYPE_CHECKING:
    from mustdrop.runtime.state import Medium
    from mustdrop.trace import Trace

SIDE = 16  # pixels of a patch
LEGEND = "in colour: kept  |  blue: merged into the patch at its centre  |  grey: gone"


@dataclass(frozen=True)
class Row:
    """One row of the drawing: an image, or a frame of a video.

    Attributes:
        label: what it is called.
        source: its picture, as it was given.
        tokens: (rows, columns) long, the vision token of each cell of the grid; -1 where a cell has none.
    """

    label: str
    source: Any
    tokens: Tensor


def draw(trace: Trace, image: Any, path: str | Path | None, sample: int) -> Any:
    """See `Trace.draw`."""
    need("matplotlib", "viz", "drawing")
    from matplotlib.figure import Figure

    row = _sample(trace, sample)
    media = _media(trace, row)
    rows = list(_rows(media, per_medium(image, trace.media, row)))
    stages = _stages(trace)
    figure = Figure(figsize=(2.6 * (len(stages) + 1), 2.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(stages) + 1, squeeze=False)
    coverage = [_coverage(trace, layer, row) for layer in stages.values()]
    for line, (one, cells) in enumerate(zip(rows, axes, strict=True)):
        pixels = _fitted(_picture(one), trace.fit, *one.tokens.shape)
        cells[0].imshow(pixels)
        cells[0].set_ylabel(one.label, fontsize=9)
        for ax, name, alive in zip(cells[1:], stages, coverage, strict=True):
            ax.imshow(_shaded(pixels, alive[one.tokens]))
            ax.set_title("\n".join([name] * (line == 0) + [_count(alive, one.tokens)]), fontsize=9)
        for ax in cells:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    figure.supxlabel(LEGEND, fontsize=9)
    if path is not None:
        figures.save(figure, path, dpi=110)
    return figure


def _sample(trace: Trace, sample: int) -> int:
    batch = trace.tokens.shape[1]
    try:
        row = operator.index(sample)
    except TypeError:
        row = -1
    if not 0 <= row < batch:
        raise ConfigError(f"sample={sample!r}: this trace has {batch} batch rows, 0 to {batch - 1}.")
    return row


def _media(trace: Trace, sample: int) -> list[Medium]:
    """The images and videos of one prompt, at least one."""
    media = trace.media[sample] if trace.media else []
    if any(medium.layout.grids for medium in media):
        return media
    if media:
        raise ConfigError(
            "the vision tokens of this model lie nowhere in the picture: learned queries read it as a whole, so there "
            "is nothing to draw."
        )
    if not int(trace.total[sample]):
        raise ConfigError(f"sample {sample} has no image or video to draw: its prompt is text alone, or embeddings.")
    raise ConfigError(
        f"the images of sample {sample} were not encoded in this call (features were given), so it is not known where "
        "their tokens lie: draw the trace of a call with pictures."
    )


def _stages(trace: Trace) -> dict[str, int]:
    """Name of each column -> decoder layer at whose input it is drawn."""
    layers = trace.tokens.shape[0]
    later = [layer + 1 for layer in trace.filters if layer + 1 < layers]
    return {"after the vision stage": 0} | {f"into layer {layer}": layer for layer in later}


def per_medium(image: Any, everyone: Sequence[Sequence[Medium]], sample: int) -> list[list[Any]]:
    """What was given to draw on, sorted to the media of one prompt: a picture for an image, frames for a video.

    Args:
        image: one picture or several, of this prompt or of all prompts of the batch, flat or prompt by prompt.
        everyone: per prompt, its media.
        sample: the prompt.

    Raises:
        ConfigError: there are more or fewer pictures than media.
    """
    media = everyone[sample]
    if image is None or isinstance(image, Mapping) or hasattr(image, "keys"):
        raise ConfigError(
            f"draw takes the pictures that were given to the processor, got {type(image).__name__}: expected a path, a "
            "Pillow image, an array or a tensor, or a list of them."
        )
    given = _parts(image)
    things = [image] if given is None else given
    for matched in (_matched, _by_grid):
        for some in _readings(things, everyone, sample):
            found = matched(some, media)
            if found is not None:
                return found
    raise ConfigError(f"sample {sample} has {_described(media)}, got {_named(image, things)} to draw on.")


def _readings(things: list[Any], everyone: Sequence[Sequence[Medium]], sample: int) -> Iterator[list[Any]]:
    """The ways in which pictures can be meant: prompt by prompt, of this prompt, of all prompts one after the other."""
    if len(things) == len(everyone):
        own = _parts(things[sample])
        if own is not None:
            yield own
    yield things
    counts = [len(media) for media in everyone]
    if len(things) == sum(counts):
        first = sum(counts[:sample])
        yield things[first : first + counts[sample]]


def _matched(things: list[Any], media: Sequence[Medium]) -> list[list[Any]] | None:
    """The pictures of each medium, None if they do not fit."""
    if len(media) == 1 and media[0].kind == "video" and things and all(_parts(thing) is None for thing in things):
        return [things]
    if len(things) != len(media):
        return None
    found = [_frames(thing) for thing in things]
    pairs = zip(found, media, strict=True)
    fits = all(frames and (medium.kind == "video" or len(frames) == 1) for frames, medium in pairs)
    return found if fits else None


def _by_grid(things: list[Any], media: Sequence[Medium]) -> list[list[Any]] | None:
    """The pictures of a prompt whose family makes one medium of all its images, a grid for each; None otherwise."""
    fits = len(media) == 1 and len(things) == len(media[0].layout.grids)
    return [things] if fits and all(_parts(thing) is None for thing in things) else None


def _frames(thing: Any) -> list[Any]:
    """One picture or several frames, however often they are wrapped; empty if something else is."""
    parts = _parts(thing)
    if parts is None:
        return [thing]
    if len(parts) == 1:
        return _frames(parts[0])
    return parts if all(_parts(part) is None for part in parts) else []


def _parts(thing: Any) -> list[Any] | None:
    """The things in a list, a batch or a folder; None for a single one."""
    if isinstance(thing, list | tuple):
        return list(thing)
    if is_array(thing) and (thing.ndim > 3 or str(thing.dtype) == "object"):
        return list(thing)
    if isinstance(thing, str | Path) and os.path.isdir(thing):  # noqa: PTH112 (False for addresses of data, too)
        return list(frames_of(Path(thing)))
    return None


def _described(media: Sequence[Medium]) -> str:
    kinds = [medium.kind for medium in media]
    counts = [(kinds.count(kind), kind) for kind in dict.fromkeys(kinds)]
    return " and ".join(f"{count} {kind}{'s' if count > 1 else ''}" for count, kind in counts)


def _named(image: Any, things: list[Any]) -> str:
    if is_array(image):
        return f"{type(image).__name__} of shape {tuple(image.shape)}"
    if things == [image]:
        return f"1 ({type(image).__name__})"
    return f"{len(things)} ({', '.join(dict.fromkeys(type(thing).__name__ for thing in things)) or 'none'})"


def _rows(media: Sequence[Medium], pictures: list[list[Any]]) -> Iterator[Row]:
    """Each frame of each grid of each medium."""
    kinds = [medium.kind for medium in media]
    for place, (medium, own) in enumerate(zip(media, pictures, strict=True)):
        kind = medium.kind
        name = f"{kind} {kinds[:place].count(kind) + 1}" if kinds.count(kind) > 1 else kind
        layout = medium.layout
        tokens = torch.full((layout.offsets[-1],), -1, dtype=torch.long, device="cpu")
        tokens[layout.cells[~layout.structural]] = medium.index[~layout.structural]
        for grid, ((frames, height, width), first) in enumerate(zip(layout.grids, layout.offsets, strict=False)):
            if not height * width:  # a picture so thin that nothing of its tiles is left
                continue
            for t in range(frames):
                label, source = _shown(name, medium, own, grid, t)
                start = first + t * height * width
                yield Row(label, source, tokens[start : start + height * width].view(height, width))


def _shown(name: str, medium: Medium, pictures: list[Any], grid: int, t: int) -> tuple[str, Any]:
    """Label and picture of frame `t` of a grid."""
    grids = medium.layout.grids
    if medium.kind == "video":
        place = t * len(pictures) // grids[grid][0]
        return f"{name}, frame {(place if len(pictures) > 1 else t) + 1}", pictures[place]
    if len(pictures) > 1:
        return f"{name} {grid + 1}", pictures[grid]
    return (name if len(grids) == 1 else f"{name}, grid {grid + 1}"), pictures[0]


def _coverage(trace: Trace, layer: int, sample: int) -> Tensor:
    """(N + 1,) float: 1 where a vision token is alive itself, 0.5 where it lives on inside a merged window, else 0.

    The last one stands for cells without a token.
    """
    n = int(trace.total[sample])
    alive = torch.zeros(n + 1, dtype=torch.float32, device="cpu")
    kept = trace.kept(layer, sample)
    slots = trace.assignment(sample)
    owner = torch.full((n + 1,), -1, dtype=torch.long, device="cpu")
    entered = trace.kept(0, sample)
    owner[slots[entered]] = entered  # slot -> the patch that names it
    living = torch.isin(owner[slots.clamp(min=0)], kept) & (slots >= 0)
    alive[:n][living] = 0.5
    alive[kept] = 1.0
    return alive


def _count(alive: Tensor, tokens: Tensor) -> str:
    """How many tokens of this row there are, and were."""
    own = tokens[tokens >= 0].unique()  # type: ignore[no-untyped-call]
    return f"{int((alive[own] == 1).sum())} of {len(own)}"


def _picture(row: Row) -> Image.Image:
    """The picture as the model saw it: turned by its EXIF data or not, whichever its grid looks like."""
    upright = read_picture(row.source, stretch=True)
    height, width = row.tokens.shape
    if height == width or is_array(row.source):
        return upright
    stored = read_picture(row.source, upright=False, stretch=True)
    return min(upright, stored, key=lambda one: abs(math.log(one.height / one.width * width / height)))


def _fitted(picture: Image.Image, fit: str, height: int, width: int) -> Image.Image:
    """The part of the image that the model saw, at `SIDE` pixels per patch."""
    size = (width * SIDE, height * SIDE)
    return ImageOps.fit(picture, size) if fit == "crop" else picture.resize(size)


def _shaded(pixels: Image.Image, coverage: Tensor) -> Any:
    """The image with dropped patches greyed out and merged ones lightly tinted."""
    array = np.asarray(pixels, dtype=np.float32) / 255
    mask = np.kron(coverage.numpy(), np.ones((SIDE, SIDE), dtype=np.float32))[..., None]
    grey = array.mean(2, keepdims=True) * 0.25 + 0.7
    tinted = array * 0.6 + np.array([0.25, 0.55, 0.95], dtype=np.float32) * 0.4
    return np.where(mask >= 1, array, np.where(mask > 0, tinted, grey))
