"""The one reader of pictures: what transformers' `load_image` shows, and more than 8 bits scaled instead of cut off."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from mustdrop.errors import PictureError
from mustdrop.eval.media import Picture
from mustdrop.integrations import conversations
from mustdrop.pictures import frames_of, in_order, read_picture, turns

PIXELS = (np.random.default_rng(0).random((20, 30, 3)) * 255).astype(np.uint8)
RAMP = np.linspace(0, 1, 2400).reshape(40, 60)
EIGHT = np.rint(RAMP * 255)


def same(picture, expected):
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_pictures_are_turned_as_load_image_turns_them(orientation, ending, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{ending}"
    Image.fromarray(PIXELS).save(path, exif=exif)
    same(read_picture(path), load_image(str(path)))
    same(Picture(path).load(), load_image(str(path)))
    with Image.open(path) as image:
        assert turns(image) == (orientation in (5, 6, 7, 8) and ending != "tif")  # Pillow itself turns a TIFF
        same(read_picture(image), load_image(image))
        same(read_picture(path, upright=False), image.convert("RGB"))
        same(Picture(path).load(upright=False), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_modes_are_converted_as_load_image_converts_them(mode):
    image = Image.fromarray(PIXELS).convert("P" if mode == "PA" else mode).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    same(read_picture(image), load_image(image))


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_colours_multiplied_with_their_opacity(mode):
    plain = Image.fromarray(PIXELS).convert("LA" if mode == "La" else "RGBA")
    same(read_picture(plain.convert(mode)), plain.convert("RGB"))


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("x.png", (RAMP * 65535).astype(np.uint16)),
        ("x.tif", (RAMP * 65535).astype(np.uint16)),
        ("x.tif", (RAMP * 65535).astype(np.int32)),
        ("x.tif", (RAMP * 255).astype(np.int32)),
        ("x.tif", RAMP.astype(np.float32)),
        ("x.tif", (RAMP * 255).astype(np.float32)),
        ("x.tif", (RAMP * 65535).astype(np.float32)),
    ],
    ids=str,
)
def test_more_than_8_bits_are_scaled_in_files(name, array, tmp_path):
    image = Image.fromarray(array)
    image.save(tmp_path / name)
    for picture in (read_picture(tmp_path / name), Picture(tmp_path / name).load(), read_picture(image)):
        assert np.abs(np.asarray(picture)[..., 0] - EIGHT).max() <= 1


def test_16_bits_stay_16_bits_where_the_picture_is_dark(tmp_path):
    Image.fromarray((RAMP * 2570).astype(np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(read_picture(tmp_path / "dark.png")).max() == 10


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_16_bits_in_either_order_of_bytes_and_turned(kind):
    mode = "I;16" if kind == "<u2" else "I;16B"
    image = Image.frombytes(mode, (60, 40), (RAMP * 65535).astype(kind).tobytes())
    image.getexif()[0x0112] = 6
    assert np.abs(np.asarray(read_picture(image))[..., 0] - np.rot90(EIGHT, -1)).max() <= 1


def of(array, **more):
    return np.asarray(read_picture(array, **more))


@pytest.mark.parametrize(
    "made",
    [
        lambda p: p,
        lambda p: p.transpose(2, 0, 1),
        lambda p: p.astype(np.float64) / 255,
        lambda p: p.astype(np.float32),
        lambda p: p.astype(np.int64),
        lambda p: p.astype(np.uint16) * 257,
        lambda p: torch.from_numpy(p),
        lambda p: torch.from_numpy(p).permute(2, 0, 1).half() / 255,
        lambda p: (torch.from_numpy(p).permute(2, 0, 1) / 255).requires_grad_(),
        lambda p: np.dstack([p, np.full(p.shape[:2], 9, np.uint8)]),
    ],
)
def test_arrays_and_tensors_of_any_layout_and_type(made):
    assert np.abs(of(made(PIXELS)).astype(int) - PIXELS).max() <= 1


def test_grey_and_black_and_white_arrays_and_values_beyond_a_range():
    grey = PIXELS[..., 0]
    for array in (grey, grey[..., None], grey[None], torch.from_numpy(grey)[None]):
        np.testing.assert_array_equal(of(array), np.repeat(grey[..., None], 3, 2))
    assert set(np.unique(of(grey > 99))) == {0, 255}
    over = RAMP * 1.15 - 0.07  # what bicubic resampling leaves
    assert np.abs(of(over)[..., 0] - np.clip(over * 255, 0, 255)).max() <= 1
    normalised = torch.randn(3, 8, 9)
    stretched = of(normalised, stretch=True)
    assert (stretched.min(), stretched.max()) == (0, 255)


def test_a_first_frame_bytes_open_files_and_addresses_of_data(tmp_path):
    path = tmp_path / "x.gif"
    Image.new("RGB", (4, 4), "red").save(path, save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    content = path.read_bytes()
    text = f"data:image/gif;base64,{base64.b64encode(content).decode()}"
    with path.open("rb") as file:
        for source in (path, str(path), content, file, text):
            same(read_picture(source), Image.new("RGB", (4, 4), "red"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://example.org/a.png", "is an address: download the picture"),
        (Path("https://example.org/a.png"), "is an address"),
        ("s3://bucket/a.png", "is an address"),
        ("nowhere.png", "there is no image nowhere.png"),
        (".", "it is a folder"),
        ("data:image/png;base64,AAAA", "cannot decode data:image"),
        (b"", "cannot decode the bytes"),
        (None, "the NoneType is no picture"),
        ([PIXELS], "the list is no picture"),
        (np.zeros((2, 5, 7)), r"shape \(2, 5, 7\) is no picture"),
        (np.zeros((1, 3, 5, 7)), r"shape \(1, 3, 5, 7\) is no picture"),
        (np.zeros((0, 4, 3)), "is no picture"),
        (Image.new("RGB", (0, 4)), "has no pixels"),
        (np.full((4, 4), np.nan), "not finite"),
        (torch.randn(3, 9, 9) * 3, "values from"),
        (np.array([[0, 900]]), "values from 0 to 900"),
        (np.array([["a"]]), "expected numbers"),
    ],
)
def test_what_is_no_picture_is_named(source, said):
    with pytest.raises(PictureError, match=said):
        read_picture(source)


def test_a_truncated_picture_is_broken(tmp_path):
    for ending in ("png", "jpg", "bmp"):
        path = tmp_path / f"torn.{ending}"
        Image.fromarray(PIXELS).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        with pytest.raises(PictureError, match=rf"cannot decode .*torn\.{ending}"):
            read_picture(path)


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    names = ["frame10.png", "frame2.png", "frame1.PNG", "frame02.jpg", "shot1_frame3.png", "shot10_frame1.png"]
    for name in [*names, "notes.txt", ".frame0.png"]:
        (tmp_path / name).touch()
    shown = [path.name for path in frames_of(tmp_path)]
    assert shown == ["frame1.PNG", "frame02.jpg", "frame2.png", "frame10.png", "shot1_frame3.png", "shot10_frame1.png"]
    assert [p.name for p in in_order([Path("9b3"), Path("10"), Path("9b"), Path("²")])] == ["9b", "9b3", "10", "²"]


def test_pictures_in_chats_are_read_the_same_way(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "x.jpg"
    Image.fromarray(PIXELS).save(path, exif=exif)
    asked = []

    class Processor:
        chat_template, tokenizer = "x", None

        def apply_chat_template(self, one, add_generation_prompt):
            return "text"

        def __call__(self, images, **more):
            asked.extend(images)

    conversations.inputs(Processor(), [conversations.user([str(path), path, Image.open(path)], "what ?")])
    for picture in asked[0]:
        same(picture, load_image(str(path)))


def test_nothing_else_opens_pictures():
    """A second reader would have its own idea of orientation and of 16 bits. The frames of a GIF are the exception."""
    package = Path(__file__).parents[1] / "src" / "mustdrop"
    found = {str(p.relative_to(package)) for p in package.rglob("*.py") if "Image.open(" in p.read_text("utf-8")}
    assert found == {"pictures.py", str(Path("eval", "media.py"))}
