"""`python -m mustdrop eval`: flags, output, exit codes."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from eval import folders
from mustdrop import cli as command
from mustdrop.errors import MustDropError
from mustdrop.eval import cli, progress
from mustdrop.eval.result import EvalResult
from mustdrop.eval.settings import Settings


def call(*arguments):
    return CliRunner().invoke(command.app, ["eval", *map(str, arguments)])


@pytest.fixture
def asked(monkeypatch):
    """The settings that a command line stands for; nothing runs."""
    found = []
    monkeypatch.setattr(cli, "evaluate", lambda settings, watcher: found.append(settings))
    return found


@pytest.mark.parametrize(
    ("arguments", "method", "knobs"),
    [
        ([], "mustdrop", {}),
        (["--method", "mustdrop", "--keep", "192"], "mustdrop", {"keep": 192}),
        (["--keep", "0.25"], "mustdrop", {"keep": 0.25}),
        (["--sparse", "--scale", "13.5", "--bias", "0.0"], "mustdrop", {"scale": 13.5, "bias": 0.0}),
        (["--sparse", "--global-thr", "0.011", "--individual-thr", "0.01"], "mustdrop",
         {"global_threshold": 0.011, "individual_threshold": 0.01}),
        (["--global_thr", "0.001", "--individual_thr", "0.001"], "mustdrop",
         {"global_threshold": 0.001, "individual_threshold": 0.001}),
        (["--no-sparse"], "none", {}),
        (["--method", "fastv", "--keep", "64", "--knob", "layer=3"], "fastv", {"keep": 64, "layer": 3}),
        (["--knob", "layers=2,6,10", "--knob", "compat=released", "--knob", "window=none"], "mustdrop",
         {"layers": (2, 6, 10), "compat": "released", "window": None}),
    ],
)  # fmt: skip
def test_flags(arguments, method, knobs, asked):
    outcome = call("mme", *arguments)
    assert outcome.exit_code == 0, outcome.output
    assert asked == [Settings("mme", method=method, knobs=knobs)]


def test_several_methods_and_budgets_are_several_runs(tmp_path):
    common = ("scenes", "--limit", 8, "--workers", 0, "--device", "cpu", "--out", tmp_path)
    several = ("--method", "none", "--method", "random", "--method", "fastv", "--keep", "192,64")
    outcome = call(*common, *several)
    assert outcome.exit_code == 1  # fastv cannot do with 64 tokens in eight layers
    assert "fastv keep=64: cannot: keep=64 is impossible" in outcome.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if (path / "result.json").exists()) == [
        "fastv-192", "none", "random-192", "random-64",
    ]  # fmt: skip
    assert "McNemar" in outcome.stdout
    alone = call("scenes", *common[1:-1], tmp_path / "alone", "--method", "random", "--keep", 64)
    assert alone.exit_code == 0
    together, single = EvalResult.read(tmp_path / "random-64"), EvalResult.read(tmp_path / "alone")
    assert (together.scores, together.cost, together.answer) == (single.scores, single.cost, single.answer)
    again = call(*common, *several[:4], "--keep", "192", "--json")
    assert [result["method"] for result in json.loads(again.stdout)] == ["none", "random"]
    wrong = call(*common, "--method", "none", "--method", "randm")
    assert isinstance(wrong.exception, MustDropError)
    assert not (tmp_path / "randm").exists()


def test_all_other_flags(asked, tmp_path):
    call(
        "pope",
        "--model",
        "m",
        "--dataset",
        "a/b",
        "--split",
        "test",
        "--batch-size",
        "3",
        "--limit",
        "5",
        "--seed",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--attn",
        "eager",
        "--out",
        tmp_path,
        "--workers",
        "0",
        "--frames",
        "4",
        "--template",
        "vicuna_v1",
        "--max-new-tokens",
        "9",
        "--method-time",
        "2",
        "--retry-failed",
    )
    assert asked == [
        Settings(
            "pope",
            model="m",
            dataset="a/b",
            split="test",
            batch_size=3,
            limit=5,
            seed=1,
            device="cpu",
            dtype="float32",
            attention="eager",
            out=tmp_path,
            workers=0,
            frames=4,
            template="vicuna_v1",
            max_new_tokens=9,
            method_time=2,
            retry_failed=True,
        )
    ]


def test_help_shows_examples_and_exit_codes():
    shown = call("--help").output
    assert "Exit codes: 0 done; 1" in shown
    assert "mustdrop eval scenes" in shown
    assert "textvqa" in shown


def test_a_table_and_its_file(tmp_path):
    outcome = call("scenes", "--keep", 192, "--limit", 8, "--workers", 0, "--out", tmp_path / "run")
    assert outcome.exit_code == 0, outcome.output
    result = EvalResult.read(tmp_path / "run")
    assert f"{result.score:.2f}" in outcome.stdout
    assert "tokens per layer" in outcome.stdout
    assert "8/8" in outcome.stderr
    assert "tokens per layer 192" in outcome.stderr  # the progress
    assert sum(
        getattr(result.time, part) for part in ("data", "vision", "prefill", "decode", "other")
    ) == pytest.approx(1)
    assert result.keep == 192
    assert 0.3 < result.cost.flops_ratio < 0.6
    assert result.latency.prefill_ms > 0
    assert result.peak_memory_bytes > 1e8
    assert result.provenance["versions"]["transformers"]
    again = call("scenes", "--keep", 192, "--limit", 8, "--workers", 0, "--out", tmp_path / "run", "--json")
    assert json.loads(again.stdout) == result.model_dump(mode="json") | {"time": json.loads(again.stdout)["time"]}


def test_a_log_file_gets_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    outcome = call("scenes", "--limit", 8, "--batch-size", 2, "--workers", 0, "--out", tmp_path / "run")
    assert "4 of 8, 0:00:" in outcome.stderr
    assert "left, right" in outcome.stderr


def test_too_many_failures_exit_with_1(tmp_path):
    root = folders.gqa(tmp_path / "data")
    (root / "data" / "images" / "n3.jpg").write_bytes(b"no picture")
    arguments = ["gqa", "--data", root, "--keep", 192, "--workers", 0, "--out", tmp_path / "run"]
    outcome = call(*arguments)
    assert outcome.exit_code == 1, outcome.output
    assert "1 failed (25.00%)" in outcome.stderr
    assert "n3.jpg" in outcome.stderr
    assert call(*arguments, "--max-failed", 0.25).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mmee"], "Did you mean 'mme'"),
        (["mme"], "llava_mme.jsonl"),
        (["mme", "--keep", "abc"], "--keep 'abc' is neither a number of tokens"),  # before anything is read or loaded
        (["scenes", "--keep", "abc"], "--keep 'abc' is neither a number of tokens"),
        (["scenes", "--method", "fastv", "--keep", "20", "--limit", "2", "--workers", "0"], "impossible with 576"),
        (["scenes", "--method", "mustdropp"], "there is no method"),
        (["scenes", "--method", "fastv", "--scale", "1"], "no knob 'scale'"),
        (["scenes", "--no-sparse", "--method", "fastv"], "give one of them"),
        (["scenes", "--sparse", "--method", "none"], "give one of them"),
        (["scenes", "--global-thr", "0.1"], "individual_threshold together"),
        (["scenes", "--scale", "1", "--keep", "64"], "one way to set how many"),
        (["scenes", "--batch-size", "0"], "--batch-size=0 must be at least 1"),
        (["scenes", "--data", "."], "leave --data and --dataset out"),
        (["scenes", "--dtype", "float8"], "choose one of auto"),
        (["scenes", "--device", "tpu9"], "--device"),
        (["scenes", "--template", "chatml"], "there is no template"),
        (["scenes", "--model", "./nowhere"], "cannot be loaded"),
        (["tgif", "--data", "."], "TRAIN_AND_VALIDATE.md"),
    ],
)
def test_mistakes_exit_with_2_and_say_what_to_do(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mustdrop", "eval", *arguments])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_knobs_are_name_and_value():
    outcome = call("scenes", "--knob", "layers")
    assert outcome.exit_code == 2
    assert "NAME=VALUE" in outcome.output


def test_not_a_result_file(tmp_path):
    with pytest.raises(MustDropError, match="no result file"):
        EvalResult.read(tmp_path)
    (tmp_path / "result.json").write_text('{"schema_version": 2}')
    with pytest.raises(MustDropError, match="not a result of `mustdrop eval`, schema 1"):
        EvalResult.read(tmp_path)
