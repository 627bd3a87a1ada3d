"""The quality benchmark: intervals, the journal, accuracy from one forced pass."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from benchmarks import __main__ as command
from benchmarks.quality import cells, intervals, measure, subjects, variants
from benchmarks.quality.journal import Journal

import generate
import mustdrop
from mustdrop import fidelity
from mustdrop.demo.model import load
from mustdrop.demo.tasks import LEARNED
from mustdrop.errors import ConfigError, UnknownMethodError, UnsupportedModelError
from mustdrop.method import registry

QUESTIONS = ["--seeds", "5", "--scenes", "2", "--batch", "1", "--keep", "0.2", "--method", "none", "--method", "random"]
SMALL = [*QUESTIONS, "--jobs", "1"]


def test_intervals_against_known_values():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=400)
    found = intervals.interval(values)
    half = 1.96 * values.std() / 20  # the bootstrap's standard error of a mean is that of the normal theory
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-5)
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.03)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.03)
    assert intervals.interval(np.ones(7)) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_whole_scenes_are_drawn_however_many_questions_each_has():
    scene = np.repeat(np.arange(100), np.arange(100) % 4 + 1)
    hard = np.random.default_rng(4).random(100)[scene]  # all questions of a scene are equally hard
    found, naive = intervals.interval(hard, scene), intervals.interval(hard)
    assert found["mean"] == naive["mean"] == pytest.approx(hard.mean(), abs=1e-6)
    assert found["high"] - found["low"] > 1.4 * (naive["high"] - naive["low"])
    alone = intervals.interval(np.arange(50.0), np.arange(50))
    assert alone == intervals.interval(np.arange(50.0))


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(2)
    hits = [intervals.interval(generator.binomial(8, 0.7, size=60) / 8) for _ in range(200)]
    assert 0.9 <= np.mean([h["low"] <= 0.7 <= h["high"] for h in hits]) <= 0.99


def test_differences_are_those_of_the_same_scenes():
    generator = np.random.default_rng(3)
    hard = generator.random(50)  # scenes differ much, methods little: only pairs tell them apart
    one, other = hard + 0.05, hard + 0.001 * generator.random(50)
    apart = intervals.difference(one, other)
    assert 0.04 < apart["low"] < apart["high"] < 0.06
    assert intervals.interval(one)["low"] < intervals.interval(other)["high"]


def test_every_method_is_measured_and_none_is_named():
    found = cells.plan(None, None)
    assert {cell.method for cell in found} == set(mustdrop.methods())
    budgets = {name: [c.keep for c in found if c.method == name] for name in mustdrop.methods()}
    for name, recipe in registry().items():
        assert budgets[name] == (list(cells.BUDGETS) if "keep" in recipe.model_fields else [None])
    with pytest.raises(UnknownMethodError, match="randm"):
        cells.plan(["randm"], None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two batches."""
    folder = tmp_path_factory.mktemp("quality")
    files = ["--journal", str(folder / "journal.jsonl"), "--out", str(folder / "quality.json")]
    threads = ["--threads", str(torch.get_num_threads())]
    assert command.main(["quality", *SMALL, *threads, *files]) == 0
    return folder


def rerun(folder, journal):
    files = ["--journal", str(journal), "--out", str(folder / "again.json")]
    assert command.main(["quality", *SMALL, "--threads", str(torch.get_num_threads()), *files]) == 0
    return json.loads((folder / "again.json").read_text())


def test_two_processes_measure_what_one_does(whole, tmp_path):
    files = ["--journal", str(tmp_path / "journal.jsonl"), "--out", str(tmp_path / "quality.json")]
    assert command.main(["quality", *QUESTIONS, "--jobs", "2", *files]) == 0
    of_two, of_one = (json.loads((folder / "quality.json").read_text()) for folder in (tmp_path, whole))
    for row in (*of_two["rows"], *of_one["rows"]):
        row.pop("seconds")
    assert of_two["rows"] == of_one["rows"]
    assert of_two["differences"] == of_one["differences"]


@pytest.mark.parametrize("which", variants.SETS)
def test_compositions_travel_to_other_processes_and_can_be_built(which):
    plan = variants.plan(which, None)
    assert pickle.loads(pickle.dumps(plan)) == plan
    model, _ = load("pages" if which in variants.PAGES or which.startswith("plus2_") else "scenes")
    for cell in plan[1 :: len(variants.BUDGETS.get(which, (None,)))]:
        with cell.patched(model, seed=0):
            pass


class Broken:
    """A subject whose batches cannot be made."""

    def names(self):
        return ["5:0", "5:1"]

    def batches(self, wanted):
        raise OSError(f"no space left for {wanted}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_fails_ends_the_run(tmp_path, monkeypatch):
    """Forks of this process, which spares them the imports; that others start too is what the test before shows."""
    forks = multiprocessing.get_context("fork")
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: forks)
    with pytest.raises(RuntimeError, match="a process failed; what was measured is in the journal") as failed:
        measure.measure(Broken(), cells.plan(["none"], None), Journal(tmp_path / "journal.jsonl", {}), jobs=2)
    assert "OSError: no space left for ['5:" in str(failed.value)


def test_the_result_says_what_was_measured_and_where(whole):
    result = json.loads((whole / "quality.json").read_text())
    assert {"versions", "hardware", "commit", "dirty", "seeds", "split", "rows", "differences"} <= set(result)
    assert result["split"] == "selection"  # held-out scenes are for the reported run
    nothing, random = result["rows"]
    assert (nothing["method"], nothing["kl"]["mean"], nothing["agreement"]["mean"]) == ("none", 0, 1)
    assert nothing["flops"] == nothing["kv"] == nothing["equal_share"] == 1
    assert random["equal_share"] <= 0.2
    assert random["questions"] == 16
    assert random["correct"]["low"] <= random["correct"]["mean"] <= random["correct"]["high"]
    assert set(random["types"]) == set(result["types"])
    assert {name: group["questions"] for name, group in random["abilities"].items()} == {
        "attributes": 8, "position": 6, "counting": 2,
    }  # fmt: skip
    apart, test = (random["against_unpruned"][name] for name in ("correct", "mcnemar"))
    assert apart["mean"] == pytest.approx((test["gained"] - test["lost"]) / 16, abs=1e-6)
    assert 0 < test["p"] <= 1
    assert nothing["answer"]["flops_ratio"] == 1
    assert random["answer"]["flops_ratio"] < 1
    assert random["answer"]["prompt_tokens"] < 0.3 * nothing["answer"]["prompt_tokens"]


@pytest.mark.parametrize("cut", ["line", "half a line"])
def test_a_kill_loses_and_doubles_nothing(whole, cut, tmp_path, monkeypatch):
    text = (whole / "journal.jsonl").read_text()
    kept = "".join(text.splitlines(keepends=True)[:-1])
    journal = tmp_path / "journal.jsonl"
    journal.write_text(kept if cut == "line" else text[: len(kept) + 40])
    done = []
    original = measure.line
    monkeypatch.setattr(measure, "line", lambda *args: done.append(args[0].key) or original(*args))
    again = rerun(tmp_path, journal)
    assert len(done) == 1
    assert len(journal.read_text().splitlines()) == len(text.splitlines())
    first = json.loads((whole / "quality.json").read_text())
    for row in (*again["rows"], *first["rows"]):
        row.pop("seconds")
    assert again["rows"] == first["rows"]


def test_a_journal_of_another_run_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"setting": 1}).add({"method": "none", "keep": None, "batch": "5:0"})
    assert ("none", None, "5:0") in Journal(path, {"setting": 1})
    with pytest.raises(ConfigError, match="delete the file or give another --journal"):
        Journal(path, {"setting": 2})
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(ConfigError, match="twice"):
        Journal(path, {"setting": 1})


def test_right_means_that_generate_says_it_word_for_word():
    (batch,) = subjects.Scenes("selection", [9], 3, 3, "cpu").batches(["9:0"])
    asked = [measure.ask(batch.model, part) for part in batch.parts]
    cell = cells.Cell("uniform", 0.1)
    line = measure.line(cell, batch, asked)
    seen = set()
    for part in batch.parts:
        inputs = part.everything
        with mustdrop.patched(batch.model, cell.method, keep=cell.keep):
            out = batch.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        found, ends = line["answers"][part.types[0]], fidelity.lengths_of(out, batch.model).tolist()
        rows = zip(out.tolist(), part.truths, found["correct"], found["length"], ends, strict=True)
        for row, truth, right, length, end in rows:
            assert bool(right) == (row[: len(truth)] == truth)
            assert length == end
            seen.add(right)
    assert seen == {0, 1}
    assert len(line["answers"]["locate"]["kl"]) == 3


def test_the_second_model_is_asked_about_samples_of_every_kind(tmp_path):
    out, files = tmp_path / "out.json", ["--journal", str(tmp_path / "journal.jsonl")]
    size = ["--model", "pages", "--seeds", "5", "--scenes", "2", "--batch", "2", "--jobs", "1", "--keep", "0.25"]
    methods = [word for name in ("none", "downsample", "uniform", "mustdrop+") for word in ("--method", name)]
    assert (
        command.main(["quality", *size, *methods, "--threads", str(torch.get_num_threads()), *files, "--out", str(out)])
        == 0
    )
    result = json.loads(out.read_text())
    rows = {row["method"]: row for row in result["rows"]}
    kinds = [kind for kind, types in LEARNED.items() if types]
    assert rows["none"]["scenes"] == 2 * len(kinds)
    assert set(rows["none"]["types"]) <= set(result["abilities"])
    assert {name.partition(".")[0] for name in rows["none"]["types"]} == set(kinds)
    assert rows["none"]["correct"]["mean"] > 0.7
    assert rows["downsample"]["flops"] < rows["uniform"]["flops"]
    smaller, divided = rows["downsample"]["vtc"], rows["uniform"]["vtc"]
    assert (smaller["hard_right"], smaller["easy_right"]) == (0, smaller["easy"])
    assert divided["hard"] + divided["easy"] == round(rows["none"]["correct"]["mean"] * rows["none"]["questions"])
    assert {(d["reference"], d["method"]) for d in result["differences"]} == {
        ("mustdrop+", "downsample"), ("mustdrop+", "uniform"),
    }  # fmt: skip
    for block in (
        "quality-pages",
        *(f"quality-pages-{name}" for name in ("beside", "abilities", "against", "details")),
    ):
        text = generate.render(f"<!-- begin: {block} -->\n<!-- end: {block} -->\n", {"quality_pages": result})
        assert "`uniform`" in text


def test_a_place_is_right_anywhere_within_its_box():
    subject = subjects.Samples("selection", [4], 3, 3, "cpu")
    (batch,) = subject.batches(["grounding:4:0"])
    (part,) = batch.parts
    asked = [measure.ask(batch.model, part)]
    line = measure.line(cells.Cell("uniform", 0.5), batch, asked)
    inputs = part.everything
    with mustdrop.patched(batch.model, "uniform", keep=0.5):
        out = batch.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    found = {kind: iter(own["correct"]) for kind, own in line["answers"].items()}
    ends = fidelity.lengths_of(out, batch.model).tolist()
    for row, (kind, tokens, end) in enumerate(zip(part.types, out.tolist(), ends, strict=True)):
        said = tokens[:end]
        assert next(found[kind]) == int(said == part.truths[row] or part.right(row, said))


def test_a_budget_that_cannot_be_met_is_a_row(tmp_path):
    out = tmp_path / "out.json"
    family = ["--family", "llava", "--family", "idefics2", "--seeds", "1", "--threads", str(torch.get_num_threads())]
    methods = ["--method", "fastv", "--method", "uniform", "--reference", "uniform", "--jobs", "1"]
    files = ["--journal", str(tmp_path / "journal.jsonl"), "--out", str(out)]
    assert command.main(["quality", *family, *methods, "--keep", "0.2", *files]) == 0
    rows = {(row["model"], row["method"]): row for row in json.loads(out.read_text())["rows"]}
    assert rows["llava-image", "fastv"]["cannot"].startswith("BudgetError: keep=0.2 is impossible")
    assert rows["idefics2-image", "uniform"]["cannot"].startswith("UnsupportedModelError")
    assert 0 <= rows["llava-image", "uniform"]["agreement"]["mean"] < 1
    assert "correct" not in rows["llava-image", "uniform"]
    with pytest.raises(UnsupportedModelError, match="there is no family 'lava'"):
        command.main(["quality", "--family", "lava", *files])


@pytest.mark.parametrize("block", ["", "-abilities", "-beside", "-against", "-types", "-details"])
def test_the_documents_show_the_result(whole, block):
    result, name = json.loads((whole / "quality.json").read_text()), f"quality{block}"
    text = generate.render(f"<!-- begin: {name} -->\n<!-- end: {name} -->\n", {"quality": result})
    assert "`random`" in text or (block == "-against" and "does not compare mustdrop+" in text)
