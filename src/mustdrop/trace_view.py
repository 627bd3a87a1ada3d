"""What a picture of a trace is made of: the images and frames of a prompt, and where their vision tokens lie."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from mustdrop.errors import ConfigError
from mustdrop.pictures import frames_of, is_array, read_picture

if TYPE_CHECKING:
    from mustdrop.runtime.records import Medium
    from mustdrop.trace import Trace


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


def sample_of(trace: Trace, sample: int) -> int:
    """The batch row that a caller means, checked."""
    batch = trace.tokens.shape[1]
    try:
        row = operator.index(sample)
    except TypeError:
        row = -1
    if not 0 <= row < batch:
        raise ConfigError(f"sample={sample!r}: this trace has {batch} batch rows, 0 to {batch - 1}.")
    return row


def media_of(trace: Trace, sample: int) -> list[Medium]:
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


def rows_of(media: Sequence[Medium], pictures: list[list[Any]]) -> Iterator[Row]:
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


def coverage(trace: Trace, layer: int, sample: int) -> Tensor:
    """(N + 1,) float: 1 where a vision token is alive itself, 0.5 where it lives on inside a merged window, else 0.

    The last one stands for cells without a token.
    """
    n = int(trace.total[sample])
    alive = torch.zeros(n + 1, dtype=torch.float32, device="cpu")
    kept = trace.kept(layer, sample)
    alive[:n][torch.isin(owners(trace, sample), kept)] = 0.5
    alive[kept] = 1.0
    return alive


def owners(trace: Trace, sample: int) -> Tensor:
    """(N,) long: the vision token, counted as `Trace.kept` counts, that each one became part of; -1 where it is gone.

    A token that enters the language model by itself is its own.
    """
    slots, entered = trace.assignment(sample), trace.kept(0, sample)
    names = torch.full((len(slots) + 1,), -1, dtype=torch.long, device="cpu")
    names[slots[entered]] = entered  # slot -> the patch that names it
    return torch.where(slots < 0, -1, names[slots.clamp(min=0)])


def picture_of(row: Row) -> Image.Image:
    """The picture as the model saw it: turned by its EXIF data or not, whichever its grid looks like."""
    upright = read_picture(row.source, stretch=True)
    height, width = row.tokens.shape
    if height == width or is_array(row.source):
        return upright
    stored = read_picture(row.source, upright=False, stretch=True)
    return min(upright, stored, key=lambda one: abs(math.log(one.height / one.width * width / height)))


def fitted(picture: Image.Image, fit: str, height: int, width: int, side: int) -> Image.Image:
    """The part of the image that the model saw, at `side` pixels per patch."""
    size = (width * side, height * side)
    return ImageOps.fit(picture, size) if fit == "crop" else picture.resize(size)
