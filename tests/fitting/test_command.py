"""`mustdrop fit` on the bundled model: files in, a scorer out, and messages for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import mustdrop
from mustdrop.cli import app
from mustdrop.demo.scenes import SceneMaker
from mustdrop.errors import ConfigError, UnknownMethodError
from mustdrop.eval.benchmark import Source
from mustdrop.fitting import examples
from mustdrop.pruners.scorer import load

FAST = ["--steps", "2", "--batch", "1", "--every", "1", "--max-new-tokens", "3"]


def run(*arguments):
    return CliRunner().invoke(app, ["fit", *map(str, arguments)])


@pytest.fixture
def mine(tmp_path):
    """A file with three prompts, one of which has no picture."""
    maker = SceneMaker("train", 4)
    scene = maker.scene()
    Image.fromarray(scene.image).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": question.text} for question in maker.questions(scene)[:3]]
    lines.append({"image": "gone.png", "question": "is there a 7 ?"})
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path / "mine.jsonl"


def test_a_scorer_from_a_file_of_ones_own(mine, tmp_path):
    out = tmp_path / "scorer"
    done = run("--samples", mine, "--out", out, *FAST)
    assert done.exit_code == 0, done.output
    assert "Divergence from the unpruned answers" in done.output
    assert f'importance="{out}"' in done.output.replace("\n", "")
    assert load(out).width == 128
    told = json.loads((out / "config.json").read_text())["about"]
    assert {"name", "versions", "seed", "settings", "held"} <= set(told)
    skipped = [line for line in done.output.splitlines() if "gone.png" in line]
    assert skipped
    assert "line 4" in done.output
    assert "1 prompt was left out" in done.output
    again = run("--samples", mine, "--out", out, *FAST)
    assert again.exit_code == 0
    assert again.output.count("Ended: all steps are done") == 1
    other = run("--samples", mine, "--out", out, *FAST, "--seed", "1")
    assert isinstance(other.exception, ConfigError)
    assert "another fit: seed=0 (now 1)" in str(other.exception)


def test_a_scorer_that_learned_nothing_says_so(mine, tmp_path):
    done = run("--samples", mine, "--out", tmp_path / "scorer", *FAST, "--rate", "1e-12")
    assert done.exit_code == 0, done.output
    assert "the scorer is untrained" in done.output.replace("\n", " ")
    assert "Wrote the scorer of step 0" in done.output


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ([], ConfigError, "either --samples FILE or --benchmark NAME"),
        (["--samples", "a.jsonl", "--benchmark", "scenes"], ConfigError, "either --samples"),
        (["--samples", "none.jsonl"], ConfigError, "cannot be read"),
        (["--samples", "none.jsonl", "--split", "train"], ConfigError, "--split belong to --benchmark"),
        (["--benchmark", "scnes"], UnknownMethodError, "scenes"),
        (["--benchmark", "scenes", "--budgets", "1"], ConfigError, "two shares"),
        (["--benchmark", "scenes", "--budgets", "0.5,0.1"], ConfigError, "smallest <= largest"),
        (["--benchmark", "scenes", "--rate", "0"], ConfigError, "rate"),
        (["--benchmark", "scenes", "--template", "x"], ConfigError, "template"),
        (["--benchmark", "scenes", "--device", "nothing"], ConfigError, "device"),
    ],
)
def test_wrong_calls_end_before_a_model_is_loaded(arguments, error, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mustdrop.fitting.cli._load", lambda *_: pytest.fail("a model was loaded"))
    done = run(*arguments)
    assert isinstance(done.exception, error), done.output
    assert text in str(done.exception)


def test_files_of_lines_and_tables_are_the_same(mine, tmp_path):
    items = examples.read(mine)
    assert [item.id for item in items] == ["line 1", "line 2", "line 3", "line 4"]
    assert items[0].medium.path == tmp_path / "a.png"
    rows = ["image,question", *(f'a.png,"{item.text}"' for item in items[:3]), 'gone.png,"is there a 7 ?"']
    (tmp_path / "mine.csv").write_text("\n".join(rows) + "\n")
    table = examples.read(tmp_path / "mine.csv")
    assert [(item.text, item.medium) for item in table] == [(item.text, item.medium) for item in items]
    (tmp_path / "video.jsonl").write_text('{"video": "v.mp4", "question": "what comes first ?"}')
    (clip,) = examples.read(tmp_path / "video.jsonl", frames=4)
    assert (clip.medium.kind, clip.medium.frames) == ("video", 4)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "[]", r"line 1.*expected lines.*got '\[\]'"),
        ("a.jsonl", '{"image": "a.png"}', "line 1"),
        ("a.jsonl", '\n{"image": "a.png", "question": ""}', "line 2"),
        ("a.jsonl", '{"image": "a.png", "video": "b.mp4", "question": "x"}', "line 1"),
        ("a.jsonl", "{", "line 1"),
        ("a.csv", "picture,question\na.png,what\n", "line 2"),
        ("a.csv", "image,question\n", "is empty"),
    ],
)
def test_lines_that_are_something_else_are_named(name, content, text, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=text):
        examples.read(tmp_path / name)
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        examples.read(tmp_path / "bytes.jsonl")


def test_questions_of_a_benchmark():
    items = examples.of_benchmark("scenes", Source(split="train", limit=5))
    assert len(items) == 5
    assert all(item.medium is not None for item in items)


def test_the_bundled_models_come_with_a_scorer():
    from mustdrop.demo.model import NAMES
    from mustdrop.demo.model import load as load_bundled

    for name in NAMES:
        model, _ = load_bundled(name)
        mustdrop.patch(model, "learned", keep=0.25)
        found = vars(model)["_mustdrop"].method.vision.rule.importance
        assert found.folder.endswith("scorer")
        told = json.loads((Path(found.folder) / "config.json").read_text())["about"]
        assert told["split"] == "train"
