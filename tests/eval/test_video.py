"""Videos from their files to answers, with a tiny Video-LLaVA of random weights."""

from __future__ import annotations

import json

import pytest
import torch

from eval import folders
from mustdrop.adapters import registry
from mustdrop.demo.model import load
from mustdrop.errors import ConfigError
from mustdrop.eval import engine
from mustdrop.eval.benchmark import Source
from mustdrop.eval.benchmarks import find
from mustdrop.eval.media import Clip
from mustdrop.eval.run import evaluate
from mustdrop.eval.settings import Settings
from tests.families import build

FRAMES, SIDE, PATCHES = 3, 24, 37  # a CLS row and 6 x 6 patches per frame


class Processor:
    """Does what Video-LLaVA's does, which needs torchvision."""

    chat_template = "there is one"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def apply_chat_template(self, messages, add_generation_prompt):
        parts = [c["text"] if c["type"] == "text" else f"<{c['type']}>" for c in messages[0]["content"]]
        return f"USER: {' '.join(parts)} ASSISTANT:"

    def __call__(self, text, videos, return_tensors, padding):  # older processors take nothing else
        assert all(video.shape == (FRAMES, 192, 192, 3) for video in videos)
        expanded = [one.replace("<video>", "<video> " * (FRAMES * PATCHES)) for one in text]
        pixels = torch.stack([torch.from_numpy(video[:, ::8, ::8]).permute(0, 3, 1, 2) / 255 for video in videos])
        return self.tokenizer(expanded, return_tensors="pt", padding=padding) | {"pixel_values_videos": pixels}


@pytest.fixture
def model(monkeypatch):
    """Any name is that of a tiny model of random weights."""

    def loaded(name, dtype, attention):
        tokenizer = load()[1].tokenizer
        tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
        tiny = build(registry()["video_llava"], "sdpa")
        tiny.config.image_token_id, tiny.config.video_token_id = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
        return tiny, Processor(tokenizer)

    monkeypatch.setattr(engine, "load", loaded)
    return "tiny"


def settings(model, tmp_path, **more):
    root = folders.msvd(tmp_path / "data")
    plain = {"workers": 0, "frames": FRAMES, "max_new_tokens": 3, "device": "cpu", "dtype": "float32"}
    return Settings("msvd", model=model, data=root, out=tmp_path / "run", **(plain | more))


def test_from_files_to_the_judges_file(model, tmp_path):
    result = evaluate(settings(model, tmp_path, method="mustdrop", knobs={"keep": 0.5}, batch_size=2))
    assert result.failed == []
    assert result.tokens.total.mean == FRAMES * PATCHES
    assert FRAMES * PATCHES / 2 - 1 < result.tokens.equal.mean <= FRAMES * PATCHES / 2
    assert result.time.vision > 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "merge.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["id", "question", "answer", "pred"]] * 2
    assert [row["id"] for row in rows] == ["v_0", "v_1"]
    assert "not the judgement by GPT" in result.metric
    assert "<video>" in result.prompt.example


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny Video-LLaVA and a processor of the real classes."""
    pytest.importorskip("torchvision")
    from transformers import CLIPImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    tokenizer = load()[1].tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    tiny = build(registry()["video_llava"], "sdpa")
    tiny.config.image_token_id, tiny.config.video_token_id = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    side = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    processor = VideoLlavaProcessor(
        CLIPImageProcessor(**side),
        VideoLlavaVideoProcessor(**side),
        tokenizer,
        patch_size=tiny.config.vision_config.patch_size,
        chat_template=(
            "{% for c in messages[0]['content'] %}"
            "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}<{{ c['type'] }}> {% endif %}"
            "{% endfor %} ASSISTANT:"
        ),
    )
    for part in (tiny, processor):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_processor_of_the_family_itself(saved, tmp_path):
    result = evaluate(settings(saved, tmp_path, method="mustdrop", knobs={"keep": 0.5}, batch_size=2))
    assert result.failed == []
    assert result.tokens.total.mean == FRAMES * PATCHES
    assert FRAMES * PATCHES / 2 - 1 < result.tokens.equal.mean <= FRAMES * PATCHES / 2
    assert "<video>" in result.prompt.example


def test_a_broken_video_fails_alone(model, tmp_path):
    whole = settings(model, tmp_path, method="none")
    (whole.data / "videos" / "vid0.gif").write_bytes(b"GIF89a")
    result = evaluate(whole)
    assert [failure.name for failure in result.failed] == ["v_0"]
    assert result.tokens.items == 1


def test_a_model_of_images_is_not_asked_about_videos_that_it_cannot_see(tmp_path):
    root = folders.msvd(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"msvd asks about videos, and --model bundled .* takes images"):
        evaluate(Settings("msvd", data=root, out=tmp_path / "run", workers=0))


def test_videos_have_the_names_of_their_sets(tmp_path):
    for name, file in (("tgif", "mp4/a.gif"), ("msrvtt", "videos/all/a.mp4"), ("activitynet", "all_test/v_a.mkv")):
        root = tmp_path / name
        folders.value(root / "test_q.json", [{"video_name": "a", "question": "q", "question_id": 1}])
        folders.value(root / "test_a.json", [{"answer": "x"}])  # in the order of the questions, without ids
        (root / file).parent.mkdir(parents=True)
        (root / file).touch()
        source = Source(root)
        (item,) = find(name).items(source, find(name).place(source))
        assert item.medium == Clip(root / file, 8)
        assert item.truth == "x"
