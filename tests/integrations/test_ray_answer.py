"""The class for `Dataset.map_batches`, called as Ray calls it; `test_ray.py` has Ray itself."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mustdrop import errors
from mustdrop.demo.scenes import SceneMaker
from mustdrop.integrations import answering
from mustdrop.integrations import conversations as chats
from mustdrop.integrations.ray import ADDED, Answer

KEEP = 64
OPTIONS = {"device": "cpu", "dtype": "float32", "generation": {"max_new_tokens": 6}}


@pytest.fixture(scope="module")
def scenes():
    maker = SceneMaker("heldout", 11)
    found = []
    for _ in range(4):
        scene = maker.scene()
        found.append((scene.image, maker.question(scene, "region2color")))
    return found


@pytest.fixture(scope="module")
def ours():
    return Answer("bundled", "mustdrop", KEEP, **OPTIONS)


def column(*cells):
    found = np.empty(len(cells), dtype=object)
    found[:] = cells
    return found


def encoded(array):
    made = io.BytesIO()
    Image.fromarray(array).save(made, "PNG")
    return made.getvalue()


def test_rows_keep_their_columns_and_get_answers(scenes, ours):
    given = {
        "id": np.arange(4),
        "image": np.stack([image for image, _ in scenes]),  # as `read_images` of one size gives them
        "question": np.array([asked.text for _, asked in scenes]),
    }
    found = ours(given)
    assert list(found) == [*given, *ADDED]
    assert all(found[name] is given[name] for name in given)
    assert list(found["generated_text"]) == [asked.answer for _, asked in scenes]
    assert set(found["error"]) == {""}
    assert set(found["num_vision_tokens"]) == {576}
    assert found["num_equal_tokens"] == pytest.approx([KEEP] * 4, abs=1)
    assert all(576 < n < 600 for n in found["num_input_tokens"])
    assert all(1 <= n <= 6 for n in found["num_generated_tokens"])


def test_an_image_may_be_written_in_many_ways(scenes, ours, tmp_path):
    array, asked = scenes[0]
    path = tmp_path / "scene.png"
    path.write_bytes(encoded(array))
    cells = [array, encoded(array), str(path), Image.fromarray(array), {"bytes": encoded(array), "path": None}]
    cells += [{"bytes": None, "path": str(path)}, [array], column(array), array[None]]
    found = ours({"image": column(*cells), "question": column(*[asked.text] * len(cells))})
    assert list(found["error"]) == [""] * len(cells)
    assert list(found["generated_text"]) == [asked.answer] * len(cells)
    assert set(found["num_vision_tokens"]) == {576}


def test_rows_with_several_images_and_with_none(scenes, ours):
    (one, asked), (two, _) = scenes[:2]
    images = column([one, two], None, float("nan"), [], one)
    found = ours({"image": images, "question": column(*[asked.text] * 5)})
    assert list(found["error"]) == [""] * 5
    assert list(found["num_vision_tokens"]) == [1152, 0, 0, 0, 576]
    assert list(found["num_equal_tokens"][1:4]) == [0.0] * 3
    assert found["generated_text"][4] == asked.answer


def test_a_bad_row_costs_only_itself(scenes, ours, tmp_path):
    array, asked = scenes[0]
    images = column(b"no picture", array, array, str(tmp_path / "missing.png"), array, np.zeros((0, 4, 3)), array)
    questions = column(asked.text, asked.text, None, asked.text, "where is <image> ?", asked.text, asked.text)
    found = ours({"image": images, "question": questions})
    good = [1, 6]
    assert [i for i, error in enumerate(found["error"]) if not error] == good
    assert [found["generated_text"][i] for i in good] == [asked.answer] * 2
    for i in set(range(7)) - set(good):
        assert found["generated_text"][i] == ""
        assert [found[name][i] for name in ADDED if name.startswith("num_")] == [0] * 4
    assert "decode" in found["error"][0]
    assert "missing.png" in found["error"][3]
    assert [found[name].dtype.kind for name in ADDED] == ["O", "O", "i", "i", "i", "f"]


def test_a_batch_that_fails_is_asked_row_by_row(scenes, ours, monkeypatch):
    array, asked = scenes[0]
    answer, sizes = ours.answerer.answer, []

    def crowded(batch, *args, **kwargs):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("too large")
        if "poison" in chats.media(batch[0])[0][1].info:
            raise ValueError("poison")
        return answer(batch, *args, **kwargs)

    poison = Image.fromarray(array)
    monkeypatch.setattr(ours.answerer, "answer", crowded)
    monkeypatch.setattr("mustdrop.integrations.ray.read_picture", lambda one: one)
    poison.info["poison"] = True
    found = ours({"image": column(Image.fromarray(array), poison), "question": column(*[asked.text] * 2)})
    assert sizes == [2, 1, 1]
    assert list(found["error"]) == ["", "ValueError: poison"]
    assert found["generated_text"][0] == asked.answer


def test_a_lost_device_is_not_the_fault_of_a_row(scenes, ours, monkeypatch):
    def lost(*args, **kwargs):
        raise torch.AcceleratorError("an illegal memory access was encountered", 700)

    monkeypatch.setattr(ours.answerer, "answer", lost)
    with pytest.raises(torch.AcceleratorError):
        ours({"image": column(scenes[0][0]), "question": column("?")})


def test_videos_go_to_the_processor_as_they_are(scenes, ours, monkeypatch):
    """Those of transformers want torchvision, which need not be here."""
    seen = []

    def answer(batch, **options):
        seen.append([chats.media(one) for one in batch])
        return [answering.Answer("yes", 9, 1, 4, 2.0) for _ in batch]

    monkeypatch.setattr(ours.answerer, "answer", answer)
    clip = np.zeros((4, 8, 8, 3), np.uint8)
    given = {
        "image": column(None, None, scenes[0][0], scenes[0][0]),
        "video": column(clip, "clip.mp4", clip, None),
        "question": column(*"?" * 4),
    }
    assert list(ours(given)["error"]) == [""] * 4
    videos, both, images = seen  # rows with other kinds of media never share a batch
    assert [len(batch) for batch in (videos, both, images)] == [2, 1, 1]
    assert videos[0] == [("video", clip)]
    assert videos[1] == [("video", "clip.mp4")]
    assert [kind for kind, _ in both[0]] == ["image", "video"]


def test_no_rows(ours):
    found = ours({"image": column(), "question": column()})
    assert all(len(found[name]) == 0 for name in ADDED)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([1, 2], 'batch_format="numpy"'),
        ({"image": column(None)}, "expected a column 'question'"),
        ({"question": column("?"), "picture": column(None)}, "found question, picture: name it with image="),
        ({"question": column("?"), "image": column(None), "error": column("")}, "error would be overwritten"),
    ],
)
def test_a_batch_of_another_kind_is_refused(ours, given, text):
    with pytest.raises(errors.ConfigError, match=text):
        ours(given)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"method": "fastr"}, errors.UnknownMethodError, "fastv"),
        ({"keep": -1}, errors.BudgetError, "positive"),
        ({"dtype": "int8"}, errors.ConfigError, "bfloat16"),
        ({"generation": {"max_new_token": 6}}, errors.ConfigError, "cannot answer with .*max_new_token"),
        ({"generation": {"num_beams": 2, "num_return_sequences": 2}}, errors.ConfigError, "one answer per prompt"),
    ],
)
def test_wrong_settings_fail_before_any_row(settings, error, text):
    with pytest.raises(error, match=text):
        Answer("bundled", **{"device": "cpu"} | settings)


def test_ray_need_not_be_there():
    code = "import sys, mustdrop.integrations.ray; print('ray' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
