"""The one reader of pictures: a file, a Pillow image, an array or a tensor becomes an RGB image of 8 bits.

The rules are those of transformers' `load_image`, so that a picture looks here as it looks to a model that is given its
path: turned as its EXIF data say, the first frame of several, the colours below a transparent pixel as they are stored.
Beyond that, values of more than 8 bits are scaled down, not cut off.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mustdrop.errors import PictureError

ORIENTATION = 0x0112  # EXIF tag
# What undoes each orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
CHANNELS = (1, 3, 4)  # grey, colours, colours with transparency
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_DEEP = ("I", "F")  # and I;16 in any order of bytes: modes that Pillow cuts off at 255
_SLACK = 0.1  # what resampling may add at either end of a range of floats, as a share of it


def read_picture(source: Any, *, upright: bool = True, stretch: bool = False, name: str | None = None) -> Image.Image:
    """A picture in RGB, 8 bits a channel, decoded to the end.

    Args:
        source: path, `data:image/...` text, bytes, open file, Pillow image, or array or tensor: (rows, columns), (rows,
            columns, channels) or (channels, rows, columns) with 1, 3 or 4 channels.
        upright: turn it as its EXIF data say. Pixels of arrays are taken as they lie.
        stretch: spread values out that fit no known range from the least to the largest; by default they are refused.
        name: what messages call it; by default its path or its type.

    Raises:
        PictureError: missing, broken, empty, of an unknown kind or range, or an address in the network.
    """
    called = name or _name(source)
    try:
        if isinstance(source, Image.Image):
            return _rgb(source, upright, stretch, called)
        if is_array(source):
            return from_array(source, stretch=stretch, name=called)
        with Image.open(_opened(source, called)) as image:
            return _rgb(image, upright, stretch, called)
    except PictureError:
        raise
    except Exception as error:  # decoders of broken files raise anything: SyntaxError, struct.error, ...
        raise PictureError(f"cannot decode {called}: {error}") from None


def size_of(path: Path) -> tuple[int, int]:
    """Columns and rows of a picture as its file lies, told by its first bytes: a small file may hold a huge picture.

    Raises:
        PictureError: the file is no picture.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # decoders of broken files raise anything
        raise PictureError(f"cannot decode {path.name}: {str(error).replace(str(path), path.name)}") from None


def from_array(source: Any, *, stretch: bool = False, name: str = "the array") -> Image.Image:
    """A picture from an array or a tensor, see `read_picture`.

    Integers of 8 and 16 bits are what they are. Wider ones are 0 to 255 or 0 to 65535, floats 0 to 1 as well: the
    narrowest range that holds them, the last one if a quarter of it is used.

    Raises:
        PictureError: no picture, or of an unknown range.
    """
    array = _channels_last(_numpy(source), _is_tensor(source), name)
    return Image.fromarray(_bytes(array, stretch, name)).convert("RGB")


def turns(image: Image.Image) -> bool:
    """Whether the EXIF data of a picture exchange its rows and columns."""
    image.load()  # see `_rgb`
    return image.getexif().get(ORIENTATION) in (5, 6, 7, 8)


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Files in the order of the numbers in their names: frame2 before frame10."""
    return sorted(paths, key=lambda path: ([_part(part) for part in re.split(r"(\d+)", path.name)], path.name))


def frames_of(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of the numbers in their names, hidden files left out."""
    return in_order(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and not p.name.startswith("."))


def _part(text: str) -> tuple[int, int, str]:
    return (0, int(text), "") if text.isdecimal() else (1, 0, text)


def _name(source: Any) -> str:
    if isinstance(source, str | Path):
        text = str(source)
        return text if len(text) <= 120 else f"{text[:60]}..."
    return f"the {type(source).__name__}"


def is_array(source: Any) -> bool:
    """Whether it is an array or a tensor."""
    return not isinstance(source, Image.Image) and (hasattr(source, "__array_interface__") or _is_tensor(source))


def _is_tensor(source: Any) -> bool:
    return hasattr(source, "detach") and hasattr(source, "numpy")  # torch need not be imported for a file


def _opened(source: Any, name: str) -> Any:
    """What Pillow can open."""
    if isinstance(source, bytes | bytearray):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return source
    if not isinstance(source, str | Path):
        raise PictureError(f"{name} is no picture: expected a path, a Pillow image, an array or a tensor.")
    text = str(source)
    if re.match(r"(?i)[a-z][a-z0-9+.-]+:/", text):
        raise PictureError(f"{name} is an address: download the picture, and give the path of the file.")
    if text.startswith("data:image/"):
        return io.BytesIO(decoded_text(text.partition(",")[2], name))
    path = Path(source).expanduser()
    if not path.is_file():
        raise PictureError(f"there is no image {name}" + (": it is a folder" if path.is_dir() else ""))
    return path


def decoded_text(text: str, name: str) -> bytes:
    """The bytes of base64 text.

    Raises:
        PictureError: it is not base64.
    """
    try:
        return base64.b64decode(text)
    except (ValueError, binascii.Error) as error:
        raise PictureError(f"{name} is not base64: {error}") from None


def _rgb(image: Image.Image, upright: bool, stretch: bool, name: str) -> Image.Image:
    if not image.width or not image.height:
        raise PictureError(f"{name} has no pixels: {image.width} x {image.height}.")
    image.load()  # Pillow turns a TIFF now
    orientation = image.getexif().get(ORIENTATION) if upright else None
    if image.mode in _DEEP or image.mode.startswith("I;"):
        image = Image.fromarray(_deep(image, stretch, name))
    elif image.mode in ("La", "RGBa"):  # colours that are multiplied with their opacity
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    image = image.convert("RGB")
    return image if orientation not in _TURNS else image.transpose(_TURNS[orientation])


def _deep(image: Image.Image, stretch: bool, name: str) -> NDArray[np.uint8]:
    """(rows, columns) of a grey picture of more than 8 bits."""
    values = np.asarray(image)
    if image.mode.startswith("I;") or (image.mode == "I" and image.format == "PNG"):
        return _scaled(values, 65535)  # older releases of Pillow hold the 16 bits of a PNG in 32
    return _bytes(values, stretch, name)


def _numpy(source: Any) -> NDArray[Any]:
    if _is_tensor(source):
        source = source.detach().cpu()
        if source.is_floating_point():
            source = source.float()  # numpy has no bfloat16
        return np.asarray(source.numpy())
    return np.asarray(source)


def _channels_last(array: NDArray[Any], channels_first: bool, name: str) -> NDArray[Any]:
    """(rows, columns) or (rows, columns, 3 or 4).

    Args:
        array: the same, or with the channels first.
        channels_first: what a shape means that can be read both ways.
        name: for messages.
    """
    shape = tuple(array.shape)
    if array.ndim == 3:
        first, last = shape[0] in CHANNELS, shape[2] in CHANNELS
        if first and (channels_first or not last):
            array = np.moveaxis(array, 0, 2)
        if first or last:
            array = array[..., 0] if array.shape[2] == 1 else array
    if array.size == 0 or array.ndim != 2 + (array.ndim == 3) or (array.ndim == 3 and array.shape[2] not in CHANNELS):
        raise PictureError(
            f"{name} of shape {shape} is no picture: expected (rows, columns), (rows, columns, channels) or (channels, "
            "rows, columns) with 1, 3 or 4 channels."
        )
    return array


def _bytes(values: NDArray[Any], stretch: bool, name: str) -> NDArray[np.uint8]:
    """Values of any type as 8 bits."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == bool:
        return _scaled(values, 1)
    if values.dtype.kind not in "iuf":
        raise PictureError(f"{name} holds {values.dtype}: expected numbers.")
    if not np.isfinite(values).all():
        raise PictureError(f"{name} holds values that are not finite (NaN or infinity).")
    low, high = float(values.min()), float(values.max())
    full = 65535 if values.dtype == np.uint16 else _full(low, high, floats=values.dtype.kind == "f")
    if full is not None:
        return _scaled(values, full)
    if not stretch:
        raise PictureError(
            f"{name} holds values from {low:g} to {high:g}: expected 0 to 1, 0 to 255 or 0 to 65535. Scale them first."
        )
    return _scaled(values.astype(np.float64) - low, (high - low) or 1)


def _full(low: float, high: float, floats: bool) -> int | None:
    """What stands for white among values from `low` to `high`; None where that cannot be told."""
    slack = _SLACK if floats else 0.0
    if low < -slack * max(high, 1.0):
        return None
    for full in (1, 255) if floats else (255,):
        if high <= full * (1 + slack):
            return full
    return 65535 if 65535 / 4 < high <= 65535 * (1 + slack) else None  # 10 or 12 bits look like a dark picture of 16


def _scaled(values: NDArray[Any], full: float) -> NDArray[np.uint8]:
    return np.clip(np.rint(values.astype(np.float64) * (255 / full)), 0, 255).astype(np.uint8)
