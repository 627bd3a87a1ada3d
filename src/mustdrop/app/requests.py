"""What somebody asks of the app, within limits: files are looked at before they are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mustdrop.budget import Keep
from mustdrop.errors import ConfigError, PictureError
from mustdrop.eval.media import Clip, MediaError
from mustdrop.explain import Prompt
from mustdrop.pictures import read_picture, size_of
from mustdrop.trace_table import quantity


@dataclass(frozen=True)
class Limits:
    """What one question may bring. An app may stand where anybody can reach it.

    Attributes:
        picture_bytes: size of a file with a picture.
        pixels: of a picture.
        video_bytes: size of a file with a video.
        frames: taken of a video.
        pictures: of one question.
        methods: asked with one after another.
        letters: of a question.
        new_tokens: of an answer.
    """

    picture_bytes: int = 20_000_000
    pixels: int = 50_000_000
    video_bytes: int = 100_000_000
    frames: int = 32
    pictures: int = 4
    methods: int = 4
    letters: int = 1000
    new_tokens: int = 256


@dataclass(frozen=True)
class Request:
    """A question, and how to answer it.

    Attributes:
        question: text.
        pictures: files, or pictures.
        video: a file in place of pictures.
        methods: names.
        keep: budget of each of them.
        frames: taken of the video.
        new_tokens: most of an answer.
    """

    question: str
    pictures: Sequence[Any] = ()
    video: str | Path | None = None
    methods: Sequence[str] = ("mustdrop",)
    keep: Keep = 0.25
    frames: int = 8
    new_tokens: int = 32


def read(request: Request, limits: Limits) -> Prompt:
    """The prompt of a request, read and checked.

    Raises:
        MustDropError: a file that is too large or cannot be read, or too much of something. The message names files
            without their folder.
    """
    question = request.question.strip()
    if not question:
        raise ConfigError("ask something: the question is empty.")
    if len(question) > limits.letters:
        raise ConfigError(f"the question has {len(question)} letters: {limits.letters} are the most.")
    if not 1 <= request.new_tokens <= limits.new_tokens:
        raise ConfigError(f"an answer of {request.new_tokens} tokens: choose 1 to {limits.new_tokens}.")
    if request.video is not None and request.pictures:
        raise ConfigError("give a picture or a video, not both.")
    if request.video is not None:
        return Prompt(question, video=_video(Path(request.video), request.frames, limits))
    if not request.pictures:
        raise ConfigError("give a picture or a video.")
    if len(request.pictures) > limits.pictures:
        raise ConfigError(f"{len(request.pictures)} pictures: {limits.pictures} are the most.")
    return Prompt(question, [_picture(one, limits) for one in request.pictures])


def _picture(source: Any, limits: Limits) -> Image.Image:
    if isinstance(source, str | Path):
        path = Path(source)
        _check_size(path, limits.picture_bytes)
        _check_pixels(path, limits.pixels)
        return read_picture(path, name=path.name)
    return read_picture(source)


def _video(path: Path, frames: int, limits: Limits) -> Any:
    if not 1 <= frames <= limits.frames:
        raise ConfigError(f"{frames} frames: choose 1 to {limits.frames}.")
    _check_size(path, limits.video_bytes)
    try:
        return Clip(path, frames).load()
    except MediaError as error:
        raise PictureError(str(error).replace(str(path), path.name)) from None


def _check_size(path: Path, most: int) -> None:
    if not path.is_file():
        raise PictureError(f"there is no file {path.name}.")
    size = path.stat().st_size
    if size > most:
        raise PictureError(f"{path.name} has {quantity(size, 'B')}: {quantity(most, 'B')} are the most.")


def _check_pixels(path: Path, most: int) -> None:
    """Refuse a small file that becomes a huge picture, before it is decoded."""
    width, height = size_of(path)
    if width * height > most:
        raise PictureError(f"{path.name} has {width} x {height} pixels: {most / 1e6:.0f} million are the most.")
