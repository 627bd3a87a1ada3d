"""`mustdrop eval --method-time`: measured after the run, beside it, and kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from eval import folders
from mustdrop import errors
from mustdrop.eval.engine import Engine, load
from mustdrop.eval.output import table
from mustdrop.eval.result import EvalResult
from mustdrop.eval.run import evaluate
from mustdrop.eval.settings import Settings


def settings(out, **more):
    own = {"method": "divprune", "knobs": {"keep": 128}, "limit": 3, "batch_size": 2, "workers": 0, "out": out}
    return Settings("scenes", **{**own, "device": "cpu", "dtype": "float32", **more})


@pytest.fixture(scope="module")
def loaded():
    return load(None, "float32", None)


def measured(out):
    lines = [json.loads(line) for line in next(out.glob("journal-*")).read_text().splitlines()]
    return [line["method_time"] for line in lines if "method_time" in line]


def test_it_is_added_to_a_run_that_is_done_and_changes_nothing_else(loaded, tmp_path, monkeypatch):
    before = evaluate(settings(tmp_path), loaded=loaded)
    assert before.method_time is None
    answers = (tmp_path / "answers.jsonl").read_text()
    monkeypatch.setattr(Engine, "ask", None)  # nothing is asked again
    after = evaluate(settings(tmp_path, method_time=2), loaded=loaded)
    assert (after.method_time.questions, after.method_time.device) == (2, "cpu")
    assert 0 < after.method_time.method_ms < after.method_time.prefill_ms
    assert 0 < after.method_time.share < 1
    assert EvalResult.read(tmp_path) == after
    rest = {"method_time": None, "resumed": []}
    assert after.model_copy(update=rest) == before.model_copy(update=rest)
    assert (tmp_path / "answers.jsonl").read_text() == answers
    assert evaluate(settings(tmp_path), loaded=loaded).method_time == after.method_time  # a later start keeps it
    assert measured(tmp_path) == [after.method_time.model_dump()]
    shown = "".join(str(cell) for column in table(after).columns for cell in column.cells)
    assert "time of the method" in shown
    assert "2 questions one by one" in shown
    assert not hasattr(loaded[0], "_mustdrop")


def test_no_more_questions_than_there_are(loaded, tmp_path):
    assert evaluate(settings(tmp_path, limit=1, method_time=8), loaded=loaded).method_time.questions == 1


def test_a_measurement_that_fails_leaves_the_result(loaded, tmp_path, monkeypatch):
    def fails(engine, batch):
        raise RuntimeError("no clock")

    monkeypatch.setattr(Engine, "method_time", fails)
    with pytest.raises(RuntimeError, match="no clock"):
        evaluate(settings(tmp_path, limit=1, method_time=1), loaded=loaded)
    assert EvalResult.read(tmp_path).method_time is None
    assert EvalResult.read(tmp_path).data.asked == 1
    assert not hasattr(loaded[0], "_mustdrop")


def test_questions_without_pictures_have_nothing_to_measure(loaded, tmp_path):
    folders.scienceqa(tmp_path / "data", 2)
    rows = json.loads((tmp_path / "data" / "llava_test_CQM-A.json").read_text())
    for row in rows:
        row.pop("image", None)
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>\n", "")
    (tmp_path / "data" / "llava_test_CQM-A.json").write_text(json.dumps(rows))
    own = settings(tmp_path / "out", data=tmp_path / "data", limit=None, method_time=1, max_new_tokens=2)
    with pytest.warns(RuntimeWarning, match="--method-time: no question with a picture"):
        result = evaluate(replace(own, benchmark="scienceqa"), loaded=loaded)
    assert result.method_time is None


def test_fewer_than_none_are_refused(tmp_path):
    with pytest.raises(errors.ConfigError, match="--method-time=-1 must be at least 0"):
        evaluate(settings(tmp_path, method_time=-1))
