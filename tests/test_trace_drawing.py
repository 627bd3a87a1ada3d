"""`trace.draw`: everything that users hold in their hands is drawn, labelled and counted row by row, or named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import mustdrop
from mustdrop import InputPruner, PrefillPruner
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError, PictureError
from support.builders import LLAMA, answer, batch
from support.masking_check import patched
from tests.families import build, fixture_of, inputs_of

pytest.importorskip("matplotlib")

RED, GREEN, BLUE = ((200, 30, 30), (30, 200, 30), (30, 30, 200))


def colour(rgb, size=(40, 40)):
    return np.full((size[1], size[0], 3), rgb, np.uint8)


@pytest.fixture(scope="module")
def three():
    """The trace of a batch: one image, none, two images."""
    model, inputs = patched(LLAMA, prefill=PrefillPruner(keep=0.4)), batch(LLAMA, (1, 0, 2))
    answer(model, inputs, steps=1)
    return mustdrop.trace(model)


def family(name, kind, pictures, **setup):
    adapter = registry()[name]
    model = build(adapter)
    inputs = inputs_of(adapter, model, kind, pictures)
    with torch.no_grad():
        mustdrop.patch(model, **setup)(**inputs)
    return mustdrop.trace(model)


@pytest.fixture(scope="module")
def video():
    size = fixture_of(registry()["video_llava"]).sizes("video")[0]
    return family("video_llava", "video", [torch.randn(size)], prefill=PrefillPruner(keep=0.5))


def shown(figure):
    """Label and mean colour of the picture of each row."""
    axes = np.array(figure.axes).reshape(len({ax.get_subplotspec().rowspan.start for ax in figure.axes}), -1)
    return [(row[0].get_ylabel(), np.asarray(row[0].images[0].get_array()).mean((0, 1)).round()) for row in axes]


def same(figure, rows):
    found = shown(figure)
    assert [label for label, _ in found] == [label for label, _ in rows]
    for (_, got), (_, expected) in zip(found, rows, strict=True):
        assert np.abs(got - expected).max() <= 2


TWO = [("image 1", RED), ("image 2", GREEN)]


@pytest.mark.parametrize(
    "given",
    [
        lambda a, b: [a, b],
        lambda a, b: (Image.fromarray(a), Image.fromarray(b)),
        lambda a, b: np.stack([a, b]),
        lambda a, b: torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2),
        lambda a, b: torch.from_numpy(np.stack([a, b])).permute(0, 3, 1, 2).half() / 255,
        lambda a, b: [a.astype(np.float64) / 255, torch.from_numpy(b).permute(2, 0, 1)],
        lambda a, b: [[a], [b]],
        lambda a, b: [[colour(BLUE)], [], [a, b]],  # prompt by prompt, as processors take them
        lambda a, b: [colour(BLUE), a, b],  # one after the other
        lambda a, b: np.stack([colour(BLUE), a, b]),
        lambda a, b: torch.from_numpy(np.stack([colour(BLUE), a, b])).permute(0, 3, 1, 2) / 255,
    ],
)
def test_several_images_however_they_come(given, three):
    same(three.draw(given(colour(RED), colour(GREEN)), sample=2), TWO)


@pytest.mark.parametrize(
    "given",
    [
        lambda a, path: a,
        lambda a, path: Image.fromarray(a),
        lambda a, path: [a],
        lambda a, path: [[a]],
        lambda a, path: path,
        lambda a, path: str(path),
        lambda a, path: [str(path)],
        lambda a, path: path.read_bytes(),
        lambda a, path: torch.from_numpy(a),
        lambda a, path: torch.from_numpy(a).permute(2, 0, 1),
        lambda a, path: torch.from_numpy(a).permute(2, 0, 1)[None].float(),
        lambda a, path: a[None, None],
        lambda a, path: [a, colour(GREEN), colour(BLUE)],
    ],
)
def test_one_image_alone_or_wrapped(given, three, tmp_path):
    pixels = colour(RED)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    same(three.draw(given(pixels, tmp_path / "x.png")), [("image", RED)])


def test_pixel_values_are_stretched_to_what_can_be_seen(three):
    picture = np.asarray(three.draw(torch.randn(3, 24, 24)).axes[0].images[0].get_array())
    assert picture.min() < 40
    assert picture.max() > 215


def test_every_row_counts_its_own_tokens(three):
    figure = three.draw([colour(RED), colour(GREEN)], sample=2)
    columns = len(figure.axes) // 2
    for column, layer in enumerate([0, *[f + 1 for f in three.filters if f + 1 < LLAMA.n_layers]], 1):
        kept = three.kept(layer, 2)
        for row, (first, last) in enumerate(((0, 36), (36, 72))):
            title = figure.axes[row * columns + column].get_title()
            assert title.split("\n")[-1] == f"{int(((kept >= first) & (kept < last)).sum())} of 36"
            assert ("layer" in title or "vision stage" in title) == (row == 0)


def test_frames_of_a_video(video, tmp_path):
    (medium,) = video.media[0]
    ((frames, _, _),) = medium.layout.grids
    pictures = [colour((10 * i, 50, 90)) for i in range(frames)]
    rows = [(f"video, frame {i + 1}", (10 * i, 50, 90)) for i in range(frames)]
    (tmp_path / "frames").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "frames" / f"frame{9 + i}.png")
    stacked = np.stack(pictures)
    clip = torch.from_numpy(stacked).permute(0, 3, 1, 2)
    for given in (pictures, [pictures], stacked, [stacked], clip, clip[None] / 255, tmp_path / "frames"):
        same(video.draw(given), rows)


def test_a_family_with_one_medium_for_all_images_of_a_prompt():
    pictures = [torch.zeros(3, 48, 48), torch.ones(3, 48, 48) * 0.5]
    trace = family("idefics3", "image", [picture + 0.1 for picture in pictures], prefill=PrefillPruner(keep=0.5))
    same(trace.draw(pictures), [("image 1", 0), ("image 2", 128)])


def test_a_whole_image_and_its_tiles_have_a_row_each():
    picture = torch.randn(fixture_of(registry()["llava_next"]).sizes("image")[-1])
    trace = family("llava_next", "image", [picture], prefill=PrefillPruner(keep=0.5))
    assert [label for label, _ in shown(trace.draw(picture))] == ["image, grid 1", "image, grid 2"]


def test_what_the_input_stage_left_out_is_shown_as_dropped():
    """The lower half of a page is empty: its cells are as their neighbours, and are not encoded."""
    picture = torch.randn(3, 32, 48)
    picture[:, 16:] = 0
    trace = family("qwen2_vl", "image", [picture], input=InputPruner())
    (medium,) = trace.media[0]
    _, rows, columns = medium.layout.grids[0]
    kept = trace.kept(0)
    before, after = trace.draw(picture).axes[:2]
    assert after.get_title().split("\n")[-1] == f"{len(kept)} of {rows * columns}"
    alive = torch.zeros(rows * columns, dtype=torch.bool)
    alive[medium.layout.cells[kept]] = True
    assert not alive.view(rows, columns)[-1].any()
    original, drawn = (np.asarray(ax.images[-1].get_array(), float)[..., :3] for ax in (before, after))
    assert original.shape == drawn.shape
    drawn *= 255  # shares of white
    high, wide = original.shape[0] // rows, original.shape[1] // columns
    for cell in range(rows * columns):
        top, left = cell // columns * high, cell % columns * wide
        spot = np.s_[top + 1 : top + high - 1, left + 1 : left + wide - 1]
        assert np.allclose(original[spot], drawn[spot], atol=2) == bool(alive[cell])


def test_tokens_that_lie_nowhere_in_the_picture():
    trace = family("aria", "image", [torch.randn(3, 24, 24)], prefill=PrefillPruner(keep=0.5))
    with pytest.raises(ConfigError, match="nowhere in the picture"):
        trace.draw(colour(RED))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_picture_lies_as_the_model_saw_it(orientation, tmp_path):
    """A model of native resolution saw a wide picture; its file may hold it turned."""
    trace = family("qwen2_vl", "image", [torch.randn(3, 16, 32)], prefill=PrefillPruner(keep=0.5))
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :20] = 200  # bright on the left
    back = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]  # quarter turns from what is seen to what is stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.rot90(wide, back)).save(tmp_path / "x.png", exif=exif)
    drawn = np.asarray(trace.draw(tmp_path / "x.png").axes[0].images[0].get_array())
    assert drawn.shape[1] == 2 * drawn.shape[0]
    assert drawn[:, : drawn.shape[1] // 2 - 2].mean() > 190
    assert drawn[:, drawn.shape[1] // 2 + 2 :].mean() < 10
    stored = Image.fromarray(wide)  # turned by nobody, though its data say so: the processor takes it as it lies
    stored.getexif()[0x0112] = 6
    if orientation == 6:
        drawn = np.asarray(trace.draw(stored).axes[0].images[0].get_array())
        assert drawn[:, : drawn.shape[1] // 2 - 2].mean() > 190


@pytest.mark.parametrize(
    ("given", "sample", "kind", "said"),
    [
        (None, 0, ConfigError, "got NoneType: expected a path"),
        ({"pixel_values": 1}, 0, ConfigError, "got dict"),
        (colour(RED), 2, ConfigError, r"sample 2 has 2 images, got ndarray of shape \(40, 40, 3\)"),
        (Image.new("RGB", (4, 4)), 2, ConfigError, r"has 2 images, got 1 \(Image\)"),
        ([colour(RED)] * 4, 0, ConfigError, r"has 1 image, got 4 \(ndarray\)"),
        ([], 0, ConfigError, r"has 1 image, got 0 \(none\)"),
        (torch.zeros(1, 5, 3, 24, 24), 0, ConfigError, r"Tensor of shape \(1, 5, 3, 24, 24\)"),
        (colour(RED), 1, ConfigError, "sample 1 has no image or video to draw: its prompt is text alone"),
        ([], 1, ConfigError, "text alone"),
        (colour(RED), 3, ConfigError, "sample=3: this trace has 3 batch rows, 0 to 2"),
        (colour(RED), -1, ConfigError, "sample=-1"),
        (colour(RED), 0.5, ConfigError, "sample=0.5"),
        (colour(RED), "0", ConfigError, "sample='0'"),
        (7, 0, PictureError, "the int is no picture"),
        ("nowhere.png", 0, PictureError, "there is no image nowhere.png"),
        (np.zeros((24, 24, 7)), 0, PictureError, r"shape \(24, 24, 7\)"),
    ],
)
def test_what_cannot_be_drawn_is_named(given, sample, kind, said, three):
    with pytest.raises(kind, match=said):
        three.draw(given, sample=sample)


def test_a_picture_goes_where_it_is_told_or_says_why_not(three, tmp_path):
    three.draw(colour(RED), tmp_path / "new" / "kept.svg")
    assert (tmp_path / "new" / "kept.svg").read_text().startswith("<?xml")
    for name in ("kept.xyz", "kept", "."):
        with pytest.raises(ConfigError, match=r"expected a file ending in one of .*png"):
            three.draw(colour(RED), tmp_path / name)


def test_images_that_were_not_encoded_in_this_call_are_named(three):
    given = dataclasses.replace(three, media=[])
    with pytest.raises(ConfigError, match=r"the images of sample 2 were not encoded in this call"):
        given.draw(colour(RED), sample=2)
