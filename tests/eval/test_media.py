"""Pictures and videos: decoded, or refused with a reason."""

from __future__ import annotations

import base64
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mustdrop.eval.media import Clip, Column, Encoded, MediaError, Picture, spread


def frame(value):
    return Image.fromarray(np.full((16, 24, 3), value, np.uint8))


@pytest.mark.parametrize(
    ("total", "wanted", "chosen"),
    [(10, 1, [0]), (10, 2, [0, 9]), (5, 5, [0, 1, 2, 3, 4]), (2, 4, [0, 0, 1, 1]), (1, 3, [0, 0, 0])],
)
def test_frames_are_spread_evenly(total, wanted, chosen):
    assert spread(total, wanted, Path("x")) == chosen


def test_pictures_of_any_mode_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        frame(200).convert(mode).save(path)
        assert Picture(path).load().mode == "RGB"


def test_broken_pictures_say_which(tmp_path):
    path = tmp_path / "torn.jpg"
    frame(0).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(MediaError, match=r"cannot decode .*torn\.jpg"):
        Picture(path).load()
    with pytest.raises(MediaError, match=r"there is no image .*gone\.jpg"):
        Picture(tmp_path / "gone.jpg").load()
    for text in ("no base64!", "a", base64.b64encode(b"no picture").decode()):
        with pytest.raises(MediaError, match="inside the line"):
            Encoded(text).load()


def test_whatever_a_decoder_raises_is_a_broken_picture(tmp_path, monkeypatch):
    def opened(source):
        raise struct.error("unpack requires a buffer of 4 bytes")

    (tmp_path / "x.tif").touch()
    monkeypatch.setattr(Image, "open", opened)
    sources = (Picture(tmp_path / "x.tif"), Encoded("eA=="), Column([{"image": {"bytes": b"x"}}], 0, "image"))
    for source in (*sources, Clip(tmp_path / "x.tif", 2)):
        with pytest.raises(MediaError, match="cannot decode"):
            source.load()


def test_a_folder_of_frames(tmp_path):
    for i in range(5):
        frame(i * 50).save(tmp_path / f"{i:03}.png")
    (tmp_path / "notes.txt").touch()
    assert Clip(tmp_path, 3).load()[:, 0, 0, 0].tolist() == [0, 100, 200]


def test_a_gif(tmp_path):
    path = tmp_path / "x.gif"
    frame(0).save(path, save_all=True, append_images=[frame(v) for v in (80, 160, 240)], duration=10)
    assert Clip(path, 2).load()[:, 0, 0, 0].tolist() == [0, 240]


def test_a_video_in_a_container(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for value in (10, 90, 170, 250):
            pixels = np.full((32, 32, 3), value, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    frames = Clip(path, 3).load()
    assert frames.shape == (3, 32, 32, 3)
    assert np.allclose(frames.mean((1, 2, 3)), [10, 170, 250], atol=25)
    path.write_bytes(b"no video")
    with pytest.raises(MediaError, match="cannot decode"):
        Clip(path, 2).load()


def test_videos_that_are_not_there(tmp_path):
    with pytest.raises(MediaError, match="there is no video"):
        Clip(tmp_path / "x.mp4", 2).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(MediaError, match="has no frames"):
        Clip(tmp_path / "empty", 2).load()
    (tmp_path / "x.gif").write_bytes(b"GIF89a")
    with pytest.raises(MediaError, match="cannot decode"):
        Clip(tmp_path / "x.gif", 2).load()


def test_columns_without_a_picture():
    with pytest.raises(MediaError, match="row 0 has no image in 'image'"):
        Column([{"image": None}], 0, "image").load()
    with pytest.raises(MediaError, match="cannot decode"):
        Column([{"image": {"bytes": b"x", "path": None}}], 0, "image").load()
