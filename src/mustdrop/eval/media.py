"""Pictures and videos of the questions: where they are, and how they are decoded. Runs in the loading processes."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
FRAME_ENDINGS = (".jpg", ".jpeg", ".png")


class MediaError(Exception):
    """A picture or a video cannot be read; the item fails and is named in the result."""


@dataclass(frozen=True)
class Picture:
    """A picture in a file."""

    path: Path
    kind = "image"

    def load(self) -> Image.Image:
        """Decode.

        Raises:
            MediaError: missing or broken.
        """
        if not self.path.is_file():
            raise MediaError(f"there is no image {self.path}")
        return _decoded(self.path, str(self.path))


@dataclass(frozen=True)
class Encoded:
    """A picture as base64 text, as MMBench's tables have it."""

    text: str
    kind = "image"

    def load(self) -> Image.Image:
        """Decode.

        Raises:
            MediaError: broken.
        """
        try:
            content = base64.b64decode(self.text)
        except ValueError as error:
            raise MediaError(f"the image inside the line is not base64: {error}") from None
        return _decoded(io.BytesIO(content), "the image inside the line")


@dataclass(frozen=True)
class Column:
    """A picture in a row of a data set of `datasets`, which decodes it when it is asked for."""

    rows: Any
    index: int
    name: str
    kind = "image"

    def load(self) -> Image.Image:
        """Decode.

        Raises:
            MediaError: no picture there, or broken.
        """
        value = self.rows[self.index][self.name]
        if isinstance(value, dict):
            value = io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]
        if value is None:
            raise MediaError(f"row {self.index} has no image in {self.name!r}")
        return _decoded(value, f"{self.name!r} of row {self.index}")


@dataclass(frozen=True)
class Drawn:
    """A picture that is there already."""

    pixels: NDArray[np.uint8]
    kind = "image"

    def load(self) -> Image.Image:
        """The picture."""
        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class Clip:
    """A video: a file, or a folder of its frames in the order of their names.

    Attributes:
        path: the file, or the folder.
        frames: how many frames the model sees, spread evenly.
    """

    path: Path
    frames: int
    kind = "video"

    def load(self) -> NDArray[np.uint8]:
        """Decode: (frames, height, width, 3).

        Raises:
            MediaError: missing or broken, or PyAV is needed and not installed.
        """
        if self.path.is_dir():
            names = sorted(p for p in self.path.iterdir() if p.suffix.lower() in FRAME_ENDINGS)
            pictures = [np.asarray(Picture(names[i]).load()) for i in spread(len(names), self.frames, self.path)]
        elif not self.path.is_file():
            raise MediaError(f"there is no video {self.path}")
        elif self.path.suffix.lower() == ".gif":
            pictures = self._gif()
        else:
            pictures = self._container()
        if len({picture.shape for picture in pictures}) > 1:
            raise MediaError(f"the frames of {self.path} differ in size")
        return np.stack(pictures)

    def _gif(self) -> list[NDArray[np.uint8]]:
        try:
            with Image.open(self.path) as image:
                chosen = spread(getattr(image, "n_frames", 1), self.frames, self.path)
                frames = {
                    i: np.asarray(frame.convert("RGB"))
                    for i, frame in enumerate(ImageSequence.Iterator(image))
                    if i in chosen
                }
        except Exception as error:  # see `_decoded`
            raise MediaError(f"cannot decode {self.path}: {error}") from None
        return [frames[i] for i in chosen]

    def _container(self) -> list[NDArray[np.uint8]]:
        try:
            import av
        except ImportError:
            raise MediaError(f"{self.path} needs PyAV: pip install 'mustdrop[eval]'") from None
        try:
            with av.open(str(self.path)) as container:
                total = container.streams.video[0].frames or sum(1 for _ in container.decode(video=0))
                container.seek(0)
                chosen = spread(total, self.frames, self.path)
                frames = {}
                for i, frame in enumerate(container.decode(video=0)):
                    if i in chosen:
                        frames[i] = frame.to_ndarray(format="rgb24")
                    if i == chosen[-1]:
                        break
        except Exception as error:  # see `_decoded`
            raise MediaError(f"cannot decode {self.path}: {error}") from None
        if not frames:
            raise MediaError(f"{self.path} has no frames")
        return [frames.get(i, frames[max(frames)]) for i in chosen]  # containers may promise more than they hold


def _decoded(source: Any, name: str) -> Image.Image:
    """A picture in colours, from a path, an open file or a picture.

    Raises:
        MediaError: it is broken. Decoders of broken files raise anything: `OSError`, `SyntaxError`, `struct.error`,
            `zlib.error`, ...; one picture must not end a run of thousands.
    """
    try:
        return (source if isinstance(source, Image.Image) else Image.open(source)).convert("RGB")
    except Exception as error:
        raise MediaError(f"cannot decode {name}: {error}") from None


Medium = Picture | Encoded | Column | Drawn | Clip


def spread(total: int, wanted: int, path: Path) -> list[int]:
    """Indices of `wanted` frames of `total`, evenly from the first to the last; frames repeat where there are too few.

    Raises:
        MediaError: no frame at all.
    """
    if total < 1:
        raise MediaError(f"{path} has no frames")
    return [round(float(place)) for place in np.linspace(0, total - 1, wanted)]
