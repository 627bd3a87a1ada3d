"""What the app does, without gradio: uploads are bounded and read, questions are asked with pruning and without."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from mustdrop.app import session as app
from mustdrop.app.requests import Limits, Request, read
from mustdrop.app.session import Session
from mustdrop.demo.model import CHECKPOINT
from mustdrop.errors import BudgetError, ConfigError, MustDropError, PictureError
from mustdrop.loading import load_model

SMALL = Limits(picture_bytes=3000, pixels=5000, video_bytes=3000, letters=40, new_tokens=32, methods=2, pictures=1)


@pytest.fixture(scope="module")
def session():
    return Session()


def test_a_question_is_answered_with_all_tokens_and_with_some(session, tmp_path):
    picture, question = app.scene(7)
    picture.save(tmp_path / "scene.png")
    request = Request(question, [tmp_path / "scene.png"], methods=("mustdrop", "uniform"), keep=0.25, new_tokens=4)
    outcome = session.ask("bundled: scenes", request)
    names = [row.name for row in outcome.rows]
    assert names[0] == "all tokens"
    assert names[1].startswith("mustdrop, keep=")
    whole, *pruned = outcome.rows
    assert (whole.tokens, whole.total, whole.flops) == (576, 576, 1)
    assert whole.answer
    for row in pruned:
        assert 143 <= row.tokens <= 144
        assert row.total == 576
        assert row.flops < 0.6
        assert row.seconds > 0
        assert "%" in row.stored
        assert row.peak == ""  # nothing counts it on a CPU
    assert question in outcome.page
    assert "uniform" in outcome.page
    again = session.ask("bundled: scenes", request)
    assert [row.answer for row in again.rows] == [row.answer for row in outcome.rows]


def test_questions_come_one_after_another(session):
    """Patching concerns the whole model: two threads would undo each other."""
    picture, question = app.scene(7)
    found, errors = {}, []

    def ask(keep):
        try:
            outcome = session.ask("bundled: scenes", Request(question, [picture], keep=keep, new_tokens=2))
            found[keep] = outcome.rows[1].tokens
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(keep,)) for keep in (0.5, 0.25, 0.1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(abs(tokens - 576 * keep) <= 1 for keep, tokens in found.items())


def test_models_of_the_hub_come_first_and_one_is_held_at_a_time():
    loads = []

    def loader(name, device, dtype):
        loads.append((name, device, dtype))
        return load_model(str(CHECKPOINT), device=device, dtype="float32")

    session = Session(["a/b", "c/d"], device="cpu", dtype="bfloat16", loader=loader)
    assert session.names[:3] == ["a/b", "c/d", "bundled: scenes"]
    picture, question = app.scene(7)
    request = Request(question, [picture], new_tokens=1)
    for name in ("a/b", "a/b", "c/d"):
        assert session.ask(name, request).rows[1].tokens <= 144
    assert loads == [("a/b", "cpu", "bfloat16"), ("c/d", "cpu", "bfloat16")]
    with pytest.raises(ConfigError, match=r"does not offer 'a/c'.*Did you mean 'a/b'"):
        session.ask("a/c", request)


def test_a_failed_question_leaves_the_model_usable(session):
    picture, question = app.scene(7)
    with pytest.raises(MustDropError):
        session.ask("bundled: scenes", Request(question, [picture], methods=("fastv",), keep=0.05))
    assert session.ask("bundled: scenes", Request(question, [picture], new_tokens=1)).rows


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"question": "  "}, "question is empty"),
        ({"question": "x" * 41}, "41 letters: 40"),
        ({"new_tokens": 33}, "choose 1 to 32"),
        ({"methods": ()}, "at least one method"),
        ({"methods": ("mustdrop", "uniform", "random")}, "3 methods at once: choose 2"),
        ({"methods": ("mustdrip",)}, "Did you mean 'mustdrop'"),
        ({"methods": ("none",)}, "no method 'none'"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"pictures": []}, "give a picture or a video"),
        ({"pictures": ["a.png", "b.png"]}, "2 pictures: 1"),
        ({"video": "a.mp4"}, "not both"),
        ({"pictures": [], "video": "clip.mp4", "frames": 33}, "33 frames: choose 1 to 32"),
    ],
)
def test_what_is_asked_is_checked_before_a_model_is_loaded(given, says):
    session = Session(limits=SMALL, loader=lambda *_, **__: pytest.fail("a model was loaded"))
    picture = Image.new("RGB", (8, 8))
    with pytest.raises((ConfigError, BudgetError), match=says):
        session.ask(session.names[0], Request(**({"question": "what ?", "pictures": [picture]} | given)))


def noise(path, *size):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("gone.png", lambda path: None, "no file gone.png"),
        ("broken.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\nno picture"), "cannot decode broken.png"),
        ("text.jpg", lambda path: path.write_text("hello"), "cannot decode text.jpg"),
        (
            "cut.png",
            lambda path: (noise(path, 20, 20), path.write_bytes(path.read_bytes()[:600])),
            "cannot decode cut.png",
        ),
        ("heavy.png", lambda path: noise(path, 60, 60), r"heavy.png has 1\d(\.\d+)? kB: 3(\.0+)? kB"),
        ("bomb.png", lambda path: Image.new("1", (90, 90)).save(path), "bomb.png has 90 x 90 pixels"),
        ("broken.mp4", lambda path: path.write_bytes(b"no video"), "cannot decode broken.mp4"),
        ("gone.mp4", lambda path: None, "no file gone.mp4"),
        ("heavy.mp4", lambda path: path.write_bytes(bytes(5000)), "heavy.mp4 has 5"),
    ],
)
def test_a_file_that_cannot_be_taken_is_one_message_without_folders(name, make, says, tmp_path):
    make(tmp_path / name)
    video = name.endswith("mp4")
    request = Request("what ?", [] if video else [tmp_path / name], video=tmp_path / name if video else None)
    with pytest.raises(PictureError, match=says) as raised:
        read(request, SMALL)
    assert str(tmp_path) not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_video_is_its_frames(tmp_path):
    frames = [Image.new("RGB", (16, 12), (40 * i, 0, 0)) for i in range(5)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    prompt = read(Request("what ?", video=tmp_path / "film.gif", frames=3), Limits())
    assert prompt.video.shape == (3, 12, 16, 3)


def test_what_nobody_foresaw_is_said_without_details_of_the_machine():
    assert app.message(ConfigError("choose one")) == "choose one"
    assert "KeyError" in app.message(KeyError("/home/somebody/secret"))
    assert "secret" not in app.message(KeyError("/home/somebody/secret"))
    assert "out of memory" in app.message(torch.OutOfMemoryError("CUDA"))
