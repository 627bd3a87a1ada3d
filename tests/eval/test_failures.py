"""Whatever goes wrong with one question is its own failure; what goes wrong with all of them ends the run."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

from mustdrop.errors import BudgetError, ConfigError, MustDropError
from mustdrop.eval import answer_loop, batches, cli
from mustdrop.eval.engine import Engine
from mustdrop.eval.media import Drawn
from mustdrop.eval.run import evaluate
from mustdrop.eval.settings import Settings

NUMBER = 6


def settings(out, **more):
    chosen = {"limit": NUMBER, "batch_size": 3, "workers": 0, "max_new_tokens": 2, "device": "cpu"} | more
    return Settings("scenes", knobs={"keep": 64}, dtype="float32", out=out, **chosen)


@pytest.fixture
def fails(monkeypatch):
    """Let the model raise for some questions; calls are recorded."""
    ask, calls = Engine.ask, []

    def install(errors):
        def asked(self, batch, limit):
            calls.append(list(batch.places))
            for place in batch.places:
                if place in errors:
                    raise errors[place]
            return ask(self, batch, limit)

        monkeypatch.setattr(Engine, "ask", asked)
        return calls

    return install


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BudgetError("too few"), "too few"),
        (ConfigError("too small"), "too small"),
        (TypeError("no such\nargument"), "TypeError: no such argument"),
        (RuntimeError("shapes differ"), "RuntimeError: shapes differ"),
        (AssertionError(), "AssertionError"),
        (MemoryError("none left"), "MemoryError: none left"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("place", [0, 4])
def test_any_error_of_one_question_is_its_own(error, reason, place, fails, tmp_path):
    calls = fails({place: error})
    result = evaluate(settings(tmp_path))
    assert [failure.reason for failure in result.failed] == [reason]
    assert result.failed_share == pytest.approx(1 / NUMBER)
    texts = [json.loads(line)["text"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [bool(text) for text in texts] == [i != place for i in range(NUMBER)]
    batch = [0, 1, 2] if place == 0 else [3, 4, 5]
    assert [call for call in calls if place in call] == [batch, [place]]
    assert len(calls) == 5  # two batches, and one of them again, question by question


def test_a_question_that_is_a_batch_is_not_asked_twice(fails, tmp_path):
    calls = fails({0: ValueError("x")})
    assert len(evaluate(settings(tmp_path, batch_size=1, limit=2)).failed) == 1
    assert calls == [[0], [1]]


def test_out_of_memory_with_many_is_not_out_of_memory_with_one(monkeypatch, tmp_path):
    ask = Engine.ask

    def short(self, batch, limit):
        if len(batch.places) > 1:
            self.model.generate = lambda **kwargs: (_ for _ in ()).throw(
                torch.OutOfMemoryError("CUDA out of memory. X")
            )
        else:
            vars(self.model).pop("generate", None)
        return ask(self, batch, limit)

    monkeypatch.setattr(Engine, "ask", short)
    with pytest.warns(RuntimeWarning, match=r"one by one.*out of memory with 3 questions"):
        assert evaluate(settings(tmp_path, limit=3)).failed == []


def test_out_of_memory_with_one_says_so_in_a_line(monkeypatch, tmp_path):
    def short(self, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    load = Engine.__init__

    def loaded(self, *arguments, **more):
        load(self, *arguments, **more)
        self.model.generate = short.__get__(self.model)

    monkeypatch.setattr(Engine, "__init__", loaded)
    with pytest.raises(ConfigError, match=r"out of memory with 1 question: it does not fit.*\(CUDA out of memory\)"):
        evaluate(settings(tmp_path, limit=2))


def test_a_failed_call_lets_go_of_its_tensors():
    class Big:
        pass

    held = []

    class Ready:
        class prompt:  # noqa: N801
            max_new_tokens = 1

        class engine:  # noqa: N801
            @staticmethod
            def ask(batch, limit):
                big = Big()
                held.append(weakref.ref(big))
                try:
                    raise KeyError("inside")
                except KeyError:
                    raise RuntimeError(f"outside {type(big)}")  # noqa: B904

    lines, error = answer_loop._said(Ready, batches.Batch([3], {}))
    assert lines[0]["item"] == 3
    gc.collect()
    assert held[0]() is None
    assert str(error).startswith("outside")


def test_what_no_question_survives_ends_the_run_and_leaves_no_failures_behind(fails, tmp_path):
    fails(dict.fromkeys(range(99), BudgetError("keep=1000 is too much")))
    with pytest.raises(BudgetError, match="too much"):
        evaluate(settings(tmp_path))
    lines = [json.loads(line) for path in tmp_path.glob("journal-*") for line in path.read_text().splitlines()]
    assert not [line for line in lines if "item" in line]


def test_the_first_many_failing_end_the_run_early(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(answer_loop, "HOPELESS", 4)
    calls = fails(dict.fromkeys(range(99), TypeError("always")))
    with pytest.raises(TypeError, match="always"):
        evaluate(settings(tmp_path, limit=12, batch_size=2))
    assert max(place for call in calls for place in call) == 3


def test_a_few_that_all_fail_are_named(fails, tmp_path):
    fails(dict.fromkeys(range(99), TypeError("always")))
    assert len(evaluate(settings(tmp_path, limit=2)).failed) == 2


def test_failures_of_a_resumed_run_are_failures(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(answer_loop, "HOPELESS", 1)
    calls = fails({5: BudgetError("this one")})
    assert len(evaluate(settings(tmp_path)).failed) == 1
    calls.clear()
    result = evaluate(settings(tmp_path, retry_failed=True))
    assert calls == [[5]]
    assert [failure.reason for failure in result.failed] == ["this one"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), torch.AcceleratorError("the device is lost")])
def test_what_concerns_more_than_a_question_ends_the_run_and_keeps_the_answers(error, fails, tmp_path):
    fails({4: error})
    with pytest.raises(type(error)):
        evaluate(settings(tmp_path, batch_size=1))
    lines = [json.loads(line) for path in tmp_path.glob("journal-*") for line in path.read_text().splitlines()]
    assert [line["item"] for line in lines if "item" in line] == [0, 1, 2, 3]


def test_an_interruption_says_how_to_go_on(fails, tmp_path, capsys):
    fails({2: KeyboardInterrupt()})
    with pytest.raises(KeyboardInterrupt):
        cli.eval_command("scenes", limit=4, batch_size=1, workers=0, out=tmp_path, device="cpu")
    assert "the same command goes on" in " ".join(capsys.readouterr().err.split())


def test_pictures_that_load_with_any_error_and_batches_that_the_processor_refuses(tmp_path, monkeypatch):
    load, make, count = Drawn.load, batches.Inputs._batch, []

    def broken(self, upright=True):
        count.append(upright)
        if len(count) == 2:
            raise MemoryError("a picture of 10 GB")
        return load(self, upright)

    def alone(self, media, failed):
        if len(media) > 1:
            raise ValueError("pictures of two sizes")
        return make(self, media, failed)

    monkeypatch.setattr(Drawn, "load", broken)
    monkeypatch.setattr(batches.Inputs, "_batch", alone)
    result = evaluate(settings(tmp_path, limit=3, upright=False))
    assert not any(count)
    assert [failure.reason for failure in result.failed] == ["cannot be loaded: MemoryError: a picture of 10 GB"]
    assert result.prompt.pictures.endswith("as they are stored (not turned by EXIF data)")


def test_a_loading_process_that_dies_is_said_in_a_line(monkeypatch):
    def died(*arguments, **more):
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
        yield

    monkeypatch.setattr(batches, "DataLoader", died)
    with pytest.raises(MustDropError, match="a loading process died"):
        list(batches.batches(None, [[0]], 0))
