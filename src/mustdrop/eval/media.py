"""Pictures and videos of the questions: where they are, and how they are decoded. Runs in the loading processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from mustdrop import pictures
from mustdrop.errors import PictureError
from mustdrop.extras import install

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")


class MediaError(Exception):
    """A picture or a video cannot be read; the item fails and is named in the result."""


@dataclass(frozen=True)
class Picture:
    """A picture in a file."""

    path: Path
    kind = "image"

    def load(self, upright: bool = True) -> Image.Image:
        """Decode.

        Args:
            upright: turn it as its EXIF data say.

        Raises:
            MediaError: missing or broken.
        """
        return _decoded(self.path, str(self.path), upright)


@dataclass(frozen=True)
class Encoded:
    """A picture as base64 text, as MMBench's tables have it."""

    text: str
    kind = "image"

    def load(self, upright: bool = True) -> Image.Image:
        """Decode.

        Args:
            upright: turn it as its EXIF data say.

        Raises:
            MediaError: broken.
        """
        name = "the image inside the line"
        try:
            content = pictures.decoded_text(self.text, name)
        except PictureError as error:
            raise MediaError(str(error)) from None
        return _decoded(content, name, upright)


@dataclass(frozen=True)
class Column:
    """A picture in a row of a data set of `datasets`, which decodes it when it is asked for."""

    rows: Any
    index: int
    name: str
    kind = "image"

    def load(self, upright: bool = True) -> Image.Image:
        """Decode.

        Args:
            upright: turn it as its EXIF data say.

        Raises:
            MediaError: no picture there, or broken.
        """
        value = self.rows[self.index][self.name]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise MediaError(f"row {self.index} has no image in {self.name!r}")
        return _decoded(value, f"{self.name!r} of row {self.index}", upright)


@dataclass(frozen=True)
class Drawn:
    """A picture that is there already."""

    pixels: NDArray[np.uint8]
    kind = "image"

    def load(self, upright: bool = True) -> Image.Image:
        """The picture."""
        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class Clip:
    """A video: a file, or a folder of its frames in the order of the numbers in their names (frame2 before frame10).

    Attributes:
        path: the file, or the folder.
        frames: how many frames the model sees, spread evenly.
    """

    path: Path
    frames: int
    kind = "video"

    def load(self, upright: bool = True) -> NDArray[np.uint8]:
        """Decode: (frames, height, width, 3).

        Args:
            upright: turn the pictures of a folder as their EXIF data say.

        Raises:
            MediaError: missing or broken, or PyAV is needed and not installed.
        """
        if self.path.is_dir():
            files = pictures.frames_of(self.path)
            frames = [np.asarray(Picture(files[i]).load(upright)) for i in spread(len(files), self.frames, self.path)]
        elif not self.path.is_file():
            raise MediaError(f"there is no video {self.path}")
        elif self.path.suffix.lower() == ".gif":
            frames = self._gif()
        else:
            frames = self._container()
        if len({frame.shape for frame in frames}) > 1:
            raise MediaError(f"the frames of {self.path} differ in size")
        return np.stack(frames)

    def _gif(self) -> list[NDArray[np.uint8]]:
        try:
            with Image.open(self.path) as image:
                chosen = spread(getattr(image, "n_frames", 1), self.frames, self.path)
                frames = {
                    i: np.asarray(frame.convert("RGB"))
                    for i, frame in enumerate(ImageSequence.Iterator(image))
                    if i in chosen
                }
        except Exception as error:  # decoders of broken files raise anything
            raise MediaError(f"cannot decode {self.path}: {error}") from None
        return [frames[i] for i in chosen]

    def _container(self) -> list[NDArray[np.uint8]]:
        try:
            import av
        except ImportError:
            raise MediaError(f"{self.path} needs PyAV: {install('eval')}") from None
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
        except Exception as error:  # decoders of broken files raise anything
            raise MediaError(f"cannot decode {self.path}: {error}") from None
        if not frames:
            raise MediaError(f"{self.path} has no frames")
        return [frames.get(i, frames[max(frames)]) for i in chosen]  # containers may promise more than they hold


def _decoded(source: Any, name: str, upright: bool) -> Image.Image:
    """A picture in colours.

    Raises:
        MediaError: it cannot be read; one picture must not end a run of thousands.
    """
    try:
        return pictures.read_picture(source, upright=upright, name=name)
    except PictureError as error:
        raise MediaError(str(error)) from None


Medium = Picture | Encoded | Column | Drawn | Clip


def spread(total: int, wanted: int, path: Path) -> list[int]:
    """Indices of `wanted` frames of `total`, evenly from the first to the last; frames repeat where there are too few.

    Raises:
        MediaError: no frame at all.
    """
    if total < 1:
        raise MediaError(f"{path} has no frames")
    return [round(float(place)) for place in np.linspace(0, total - 1, wanted)]
