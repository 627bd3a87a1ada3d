"""The real command, killed and started again, and shared among processes: the same files as one undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from eval import folders
from mustdrop.errors import ConfigError
from mustdrop.eval.engine import load
from mustdrop.eval.journal import Journal
from mustdrop.eval.processes import Share, share
from mustdrop.eval.result import EvalResult
from mustdrop.eval.run import evaluate
from mustdrop.eval.settings import Settings

NUMBER = 24
SRC = Path(__file__).parents[2] / "src"


def command(out, *more, launcher=(), **environment):
    """Start `mustdrop eval` in a process of its own, or in those of a launcher."""
    arguments = ["eval", "scenes", "--keep", "128", "--limit", str(NUMBER), "--batch-size", "2", "--out", str(out)]
    settings = os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "mustdrop", *arguments, "--dtype", "float32", *more],
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    evaluate(Settings("scenes", dtype="float32", knobs={"keep": 128}, limit=NUMBER, batch_size=2, workers=0, out=out))
    return out


def same(out, undisturbed):
    assert (out / "answers.jsonl").read_text() == (undisturbed / "answers.jsonl").read_text()
    mine, other = EvalResult.read(out), EvalResult.read(undisturbed)
    assert mine.scores == other.scores
    assert mine.tokens == other.tokens
    assert mine.setup_sha256 == other.setup_sha256
    items = [line["item"] for line in lines(out) if "item" in line]
    assert sorted(items) == list(range(NUMBER))  # none lost, none doubled


def lines(out):
    return [json.loads(line) for path in sorted(out.glob("journal-*")) for line in path.read_text().splitlines()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again(undisturbed, tmp_path, monkeypatch):
    """The processes are forks of this one, which spares them the imports. The model is loaded before: transformers does
    that in threads, and those of torch do not survive a fork.

    Each is killed when it has written an eighth of the journal and a little. It pauses after each batch, so that it
    cannot reach the end while a busy machine keeps this process waiting.
    """
    rng, journal = random.Random(1), tmp_path / "journal-0000.jsonl"
    step = sum(map(size, undisturbed.glob("journal-*"))) // 8
    settings = Settings(
        "scenes", dtype="float32", knobs={"keep": 128}, limit=NUMBER, batch_size=2, workers=1, out=tmp_path
    )
    loaded = load(None, "float32", None)
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                monkeypatch.setattr(Journal, "write", slowly(Journal.write))
                evaluate(settings, loaded=loaded)
            except BaseException:
                traceback.print_exc()  # nobody else hears of it
            finally:
                os._exit(0)  # nothing of pytest runs in here
        enough = size(journal) + step + rng.randrange(step // 2)
        until = time.monotonic() + 60
        while size(journal) < enough and time.monotonic() < until:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    evaluate(settings)
    same(tmp_path, undisturbed)


def slowly(write):
    def written(*args):
        write(*args)
        time.sleep(0.3)

    return written


def size(path):
    return path.stat().st_size if path.exists() else 0


def test_two_processes_share_the_questions(undisturbed, tmp_path):
    (tmp_path / "journal-0000.jsonl").write_bytes(b'{"item": 23, "te')  # a kill in the middle of a line leaves this
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)} for rank in (1, 0)]
    printed = [finish(process) for process in [command(tmp_path, "--json", **rank) for rank in ranks]]
    assert not printed[0]  # only the first one tells
    assert json.loads(printed[1])["scores"] == EvalResult.read(tmp_path).scores
    assert len(list(tmp_path.glob("journal-*"))) == 2
    same(tmp_path, undisturbed)
    assert EvalResult.read(tmp_path).time.processes == 2


def test_accelerate_launch_gives_the_file_of_one_process(undisturbed, tmp_path):
    """The real launcher. `--multi_gpu` starts its processes on a machine without GPUs too; `--cpu` would start one."""
    pytest.importorskip("accelerate")
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    printed = finish(command(tmp_path, "--json", launcher=launcher, CUDA_VISIBLE_DEVICES=""))
    assert json.loads(printed) == json.loads((tmp_path / "result.json").read_text())  # one process tells
    assert all(
        any("item" in json.loads(line) for line in (tmp_path / f"journal-{rank:04}.jsonl").read_text().splitlines())
        for rank in range(2)
    )
    same(tmp_path, undisturbed)
    assert EvalResult.read(tmp_path).time.processes == 2


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Share(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Share(3, 4, 1)),  # torchrun, accelerate launch
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, Share(1, 2, 1)),  # Intel MPI
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Share(1, 2, 0)),  # MPICH
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, Share(2, 3, 0)),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1"}, Share(1, 2, 1)),
        ({"RANK": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, Share(0, 2, 0)),  # a pair counts
    ],
)
def test_every_launcher_says_which_process_this_is(environment, place, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert share() == place


def test_more_processes_finish_what_one_began(undisturbed, tmp_path, monkeypatch):
    settings = Settings(
        "scenes", dtype="float32", knobs={"keep": 128}, limit=NUMBER, batch_size=2, workers=0, out=tmp_path
    )
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings)
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("2", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        result = evaluate(settings)
        assert (result is None) == (rank != "0")
    same(tmp_path, undisturbed)


def stop_after(monkeypatch, calls):
    """Interrupt the run after some calls of the model."""
    from mustdrop.eval.engine import Engine

    ask, count = Engine.ask, []

    def counted(self, batch, limit):
        if len(count) == calls:
            raise KeyboardInterrupt
        count.append(1)
        return ask(self, batch, limit)

    monkeypatch.setattr(Engine, "ask", counted)


def test_batches_answer_as_single_questions(undisturbed, tmp_path):
    settings = Settings(
        "scenes", dtype="float32", knobs={"keep": 128}, limit=NUMBER, batch_size=7, workers=0, out=tmp_path
    )
    evaluate(settings)
    same(tmp_path, undisturbed)


def test_the_run_of_other_settings_is_refused(undisturbed):
    with pytest.raises(ConfigError, match=r"keep.*128.*64"):
        evaluate(Settings("scenes", dtype="float32", knobs={"keep": 64}, limit=NUMBER, workers=0, out=undisturbed))
    with pytest.raises(ConfigError, match=r"limit: 24 there, 25 now"):
        evaluate(Settings("scenes", dtype="float32", knobs={"keep": 128}, limit=NUMBER + 1, workers=0, out=undisturbed))


def test_a_finished_run_is_only_scored_again(undisturbed, monkeypatch):
    stop_after(monkeypatch, 0)
    before = (undisturbed / "answers.jsonl").read_text()
    result = evaluate(
        Settings("scenes", dtype="float32", knobs={"keep": 128}, limit=NUMBER, workers=0, out=undisturbed)
    )
    assert result.data.asked == NUMBER
    assert (undisturbed / "answers.jsonl").read_text() == before


def test_broken_pictures_and_lines_are_named_and_asked_again(tmp_path):
    root = folders.gqa(tmp_path / "data")
    picture = root / "data" / "images" / "n2.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 3])
    (root / "data" / "images" / "n3.jpg").rename(tmp_path / "n3.jpg")
    questions = root / "llava_gqa_testdev_balanced.jsonl"
    questions.write_text(questions.read_text() + '{"question_id": "9", "ima\n[1]\n{"question_id": "8", "image": "x"}\n')
    settings = Settings("gqa", knobs={"keep": 192}, data=root, out=tmp_path / "out", workers=0, batch_size=3)
    result = evaluate(settings)
    named = {failure.name: failure.reason for failure in result.failed}
    assert list(named) == [f"{questions.name} line {n}" for n in (5, 6, 7)] + ["2", "3"]
    assert named[f"{questions.name} line 7"] == "no text"
    assert "cannot decode" in named["2"]
    assert "there is no image" in named["3"]
    assert result.failed_share == pytest.approx(5 / 7)
    answers = [json.loads(line)["text"] for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [bool(text) for text in answers] == [True, True, False, False]  # every question has its line
    assert result.scores["accuracy"] == 50.0
    picture.write_bytes(whole)
    again = evaluate(Settings(**(vars(settings) | {"retry_failed": True})))
    assert [failure.name for failure in again.failed][3:] == ["3"]
    assert again.scores["accuracy"] == 75.0
