"""The command line: every command runs, says what it does, and ends with the exit code that it documents."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import mustdrop
from mustdrop import cli, doctor, extras
from mustdrop.demo.model import CHECKPOINT
from mustdrop.doctor import installed, selftest

COMMANDS = (
    "demo", "explain", "app", "eval", "eval-suite", "report", "tune", "fit", "bench", "methods", "adapters", "doctor",
)  # fmt: skip
ROOT = Path(__file__).parents[1]


def call(monkeypatch, capsys, *arguments):
    """Exit code, output and errors of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["mustdrop", *map(str, arguments)])
    for console in (cli.common.console, cli.common.errors):
        monkeypatch.setattr(console, "_width", 200)
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    seen = capsys.readouterr()
    return code, seen.out, seen.err


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


def test_help_names_every_command_and_the_exit_codes(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert sorted(COMMANDS) == sorted(command_names())
    assert "Exit codes" in out


def command_names():
    return [entry.name or entry.callback.__name__ for entry in cli.app.registered_commands]


def test_the_documents_name_every_command_and_no_other():
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    table = page.partition("| command | what it does |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == sorted(command_names())
    (listed,) = [line for line in page.splitlines() if "print JSON with `--json`" in line]
    printing = [name for name in command_names() if "--json" in parameters(name)]
    assert sorted(re.findall(r"`(\w[\w-]*)`", listed)) == sorted(printing)
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    texts = [path.read_text(encoding="utf-8") for path in pages]
    blocks = [block for text in texts for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL)]
    called = {match[1] for block in blocks for match in re.finditer(r"\bmustdrop ([a-z]+)", block)}
    assert called <= set(command_names()), called


def parameters(name):
    """The options of a command."""
    command = typer.main.get_command(cli.app).commands[name]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error of the test."""

    def load(*arguments, **more):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mustdrop.demo.model.load", load)
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", load)


@pytest.mark.parametrize("command", ["demo", "bench", "tune"])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--method", "nope"), "there is no method 'nope'"),
        (("--method", "fastr"), "Did you mean 'fastv'?"),
        (("--keep", "lots"), "neither a number of tokens"),
        (("--keep", "0"), "positive"),
        (("--keep", "1.5"), "(0, 1]"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--device", "nowhere"), "device 'nowhere' cannot be used here"),
        (("--device", "meta"), "hold no numbers"),
        (("--dtype", "float8"), "choose one of auto"),
        (("--image", "no-such.png", "--question", "what ?"), "no-such.png"),
        (("--image", "notes.png", "--question", "what ?"), "notes.png"),
    ],
)
def test_mistakes_are_said_before_a_model_is_loaded(command, arguments, text, run, no_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.png").write_text("not an image")
    more = ("--agreement", "0.9") if command == "tune" else ()
    code, out, err = run(command, *arguments, *more)
    assert code == cli.WRONG
    assert text in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("command", [["demo"], ["tune", "--kl", "1"]])
def test_a_folder_to_write_to_that_is_a_file_is_said_at_once(command, run, no_model, tmp_path):
    (tmp_path / "out").touch()
    code, _, err = run(*command, "--out", tmp_path / "out")
    assert code == cli.WRONG
    assert "is a file: give the name of a folder" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ["demo"],
        ["bench"],
        ["tune", "--kl", "1"],
        ["eval", "scenes", "--limit", "2"],
        ["doctor"],
        ["doctor", "--no-self-test"],
    ],
    ids=" ".join,
)
def test_a_gpu_that_is_not_there_is_one_line(command, run, no_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*command, "--device", "cuda")
    assert (code, out) == (cli.WRONG, "")
    assert len(err.splitlines()) == 1
    assert "device 'cuda' cannot be used here" in err


@pytest.mark.parametrize("command", ["demo", "bench", "tune"])
def test_a_placeholder_in_a_question_is_one_line(command, run, tmp_path):
    from PIL import Image

    Image.new("RGB", (30, 20), "navy").save(tmp_path / "sea.png")
    more = ("--agreement", "0.9") if command == "tune" else ()
    code, _, err = run(command, "--image", tmp_path / "sea.png", "--question", "what is <image> ?", *more)
    assert code == cli.WRONG
    assert len(err.splitlines()) == 1
    assert "leave it out" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_has_examples_that_parse(name, run, monkeypatch):
    code, out, _ = run(name, "--help")
    examples = [line.strip() for line in out.splitlines() if line.strip().startswith(f"python -m mustdrop {name}")]
    assert code == 0
    assert len(examples) >= 2
    options = {word for line in examples for word in line.split() if word.startswith("--")}
    listed = out.split("Examples:")[0]
    assert all(option in listed for option in options)


@pytest.mark.parametrize(
    ("launcher", "arguments", "code"),
    [
        (("-m", "mustdrop"), ("report", "/no/such"), cli.WRONG),
        (("-c", "from mustdrop.cli import main; main()"), ("--version",), 0),  # what the console script does
    ],
)
def test_it_is_a_process_of_its_own(launcher, arguments, code):
    done = subprocess.run([sys.executable, *launcher, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stdout == ("" if code else f"mustdrop {mustdrop.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("demmo",), "demmo"),
        (("bench", "--new-tokens", "1"), "new-tokens"),
        (("demo", "--image", "cat.png"), "--question"),
        (("demo", "--keep", "5", "--method", "fastv"), "576 vision tokens"),
        (("report",), "Missing argument"),
        (("doctor", "--device", "cuda:99"), "cuda:99"),
    ],
)
def test_wrong_calls_say_what_is_wrong_and_end_with_2(arguments, text, run):
    code, out, err = run(*arguments)
    assert code == cli.WRONG
    assert text in err
    assert "Traceback" not in out + err


def test_an_image_that_is_none_ends_with_2(run, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    code, _, err = run("bench", "--image", tmp_path / "notes.png", "--rounds", "1")
    assert code == cli.WRONG
    assert "notes.png" in err


def test_the_demo_of_a_model_in_a_folder(run, tmp_path):
    from PIL import Image

    Image.new("RGB", (192, 192), "navy").save(tmp_path / "sea.png")
    asked = ("--question", "where is the red one ?", "--keep", "64", "--method", "mustdrop", "--dtype", "float32")
    out = tmp_path / "out"
    code, text, err = run("demo", "--model", CHECKPOINT, "--image", tmp_path / "sea.png", *asked, "--out", out)
    assert code == 0, err
    assert "mustdrop keep=64" in text
    assert json.loads((out / "demo.json").read_text())["rows"][1]["keep"] == 64
    assert (out / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_demo_stops_before_it_asks(run, monkeypatch):
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    code, _, err = run("demo")
    assert code == cli.WRONG
    assert extras.install("viz") in err


def test_methods_and_adapters_as_tables_and_as_json(run):
    for command, names in (("methods", mustdrop.methods()), ("adapters", mustdrop.adapters())):
        code, out, _ = run(command)
        assert code == 0
        assert all(name in out for name in names)
        code, out, _ = run(command, "--json")
        assert sorted(json.loads(out)) == sorted(names)
    _, out, _ = run("methods", "--json")
    assert json.loads(out)["mustdrop"]["knobs"]["window"] == 3


def test_bench_measures_and_writes_what_it_prints(run, tmp_path):
    file = tmp_path / "new" / "bench.json"
    arguments = ("bench", "--rounds", "2", "--new-tokens", "3", "--keep", "64", "--keep", "0.5", "--batch", "2")
    code, out, _ = run(*arguments, "--device", "cpu", "--json", "--out", file)
    assert code == 0
    record = json.loads(out)
    assert json.loads(file.read_text()) == record
    assert [row["keep"] for row in record["rows"]] == [64, 0.5]
    first = record["rows"][0]
    assert first["vision_tokens"] == [576, 576]
    assert all(63 < tokens <= 64 for tokens in first["equal_tokens"])
    assert first["flops_ratio"] < record["rows"][1]["flops_ratio"] < 1
    for name in ("prefill_speed_up", "decode_speed_up"):
        assert 0 < first[name]["min"] <= first[name]["median"] <= first[name]["max"]
    assert first["peak_bytes"] is None
    assert record["versions"]["torch"]
    code, out, _ = run(*arguments[:7], "--device", "cpu")
    assert code == 0
    assert "mustdrop keep=64" in out


def test_doctor_finds_this_installation_well(run):
    code, out, _ = run("doctor", "--device", "cpu")
    assert code == 0, out
    assert "All is well" in out
    for text in (torch.__version__, "sdpa", "flash_attention_2", "reference, because", *doctor.CHECKS):
        assert text in out


def test_doctor_as_json_without_the_self_test(run):
    code, out, _ = run("doctor", "--no-self-test", "--json", "--device", "cpu")
    found = json.loads(out)
    assert code == 0
    assert found["self_test"] == []
    assert found["failed"] is False
    assert found["versions"]["mustdrop"] == mustdrop.__version__
    assert found["kernels"]["cpu"].startswith("reference")


def wrong_logits(monkeypatch):
    def logits(self):
        self.count = getattr(self, "count", 0) + 1
        return self.model(**self.question[0]).logits + (1e-6 if self.count == 2 else 0.0)

    monkeypatch.setattr(selftest.Bundled, "logits", logits)


def wrong_kernels(monkeypatch):
    said = subprocess.CompletedProcess([], 0, '{"compact": 0.0, "merge_tokens": 0.25}', "")
    monkeypatch.setattr(selftest.subprocess, "run", lambda *arguments, **options: said)


@pytest.mark.parametrize(
    ("broken", "check", "text"),
    [
        (wrong_logits, "keep=1.0 is bit-identical", "patched with keep=1.0 differs"),
        (lambda m: m.setattr(selftest.Bundled, "answer", lambda s: "?"), "bundled model answers", "'?', expected"),
        (lambda m: m.setattr(selftest.masking, "difference", lambda *a: (0.5, 1)), "dropping equals masking", "0.5"),
        (lambda m: m.setattr(selftest.masking, "difference", lambda *a: (float("nan"), 1)), "dropping equals", "nan"),
        (wrong_kernels, "kernels equal", "{'merge_tokens': 0.25}"),
        (lambda m: m.setattr("mustdrop.demo.model.CHECKPOINT", "nowhere"), "bundled model answers", "OSError"),
    ],
    ids=["bits", "answer", "masking", "nan", "kernels", "checkpoint"],
)
def test_a_failed_check_is_named_and_ends_with_1(broken, check, text, run, monkeypatch):
    if "kernels" in check:
        pytest.importorskip("triton")
    broken(monkeypatch)
    keep = {name: function for name, function in doctor.CHECKS.items() if name.startswith(check)}
    monkeypatch.setattr(selftest, "CHECKS", keep)
    code, out, _ = run("doctor", "--device", "cpu")
    assert code == cli.FAILED
    assert text in out
    assert "failed" in out
    assert "Something is wrong" in out


def test_a_missing_package_ends_with_1(run, monkeypatch):
    needed = [extras.Needed("einops", ">=0.8", "0.7.1"), extras.Needed("numpy", "", None)]
    monkeypatch.setattr(extras, "requirements", lambda extra=None: needed if extra is None else [])
    code, out, _ = run("doctor", "--no-self-test")
    assert code == cli.FAILED
    assert "einops>=0.8 (found 0.7.1), numpy (not installed)" in out


def test_an_interpreter_that_does_not_work_is_skipped_aloud(run, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(selftest, "CHECKS", {"kernels equal references": selftest.kernels_here})
    monkeypatch.setattr(selftest.sys, "executable", "/bin/false")
    code, out, _ = run("doctor", "--device", "cpu")
    assert code == 0
    assert "skipped" in out
    monkeypatch.setattr(selftest.dispatch, "has_triton", lambda: False)
    _, out, _ = run("doctor", "--device", "cpu")
    assert "triton is not installed" in out


def test_what_kernels_are_asked_for_is_said(monkeypatch):
    monkeypatch.setattr("mustdrop.kernels.dispatch._forced", ["reference"])
    assert "asks for it" in installed.kernels()["cpu"]
    monkeypatch.setattr("mustdrop.kernels.dispatch._forced", ["triton"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert installed.kernels()["cpu"].startswith("an error: triton is asked for")


def test_a_missing_extra_is_named_with_what_brings_it():
    with pytest.raises(mustdrop.errors.MissingPackageError, match=re.escape(extras.install("viz"))):
        extras.need("no_such_module", "viz", "drawing")


def test_until_a_release_nothing_says_that_the_package_index_has_the_package(monkeypatch):
    assert "'.[viz]'" in extras.install("viz")
    assert "'.'" in extras.install()
    monkeypatch.setattr(extras, "PUBLISHED", True)
    assert extras.install("viz") == "pip install 'mustdrop[viz]'"
    assert extras.install() == "pip install 'mustdrop'"
    monkeypatch.undo()
    from_index = re.compile(r"pip install (?:[\w.\[\]-]+ )*['\"]?mustdrop\b(?!-)")
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("examples/*")]
    texts = {path: path.read_text(encoding="utf-8") for path in pages if path.is_file() and path.name != "extras.py"}
    wrong = [str(path) for path, text in texts.items() if from_index.search(text)]
    assert extras.PUBLISHED or not wrong


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory): a smaller picture"),
        (MemoryError(), "out of memory (the machine has no more)"),
    ],
    ids=["device", "machine"],
)
def test_too_little_memory_is_one_line(error, text, run, monkeypatch):
    def load(*arguments, **more):
        raise error

    monkeypatch.setattr("mustdrop.demo.model.load", load)
    code, _, err = run("bench", "--device", "cpu")
    assert code == cli.WRONG
    assert text in err
    assert len(err.splitlines()) == 1


def test_an_error_that_nobody_foresaw_keeps_its_traceback(run, monkeypatch):
    def load(*arguments, **more):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("mustdrop.demo.model.load", load)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run("bench", "--device", "cpu")
