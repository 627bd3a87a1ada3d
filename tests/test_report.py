"""`mustdrop report`: only runs of one set-up are compared, and what is missing is said."""

from __future__ import annotations

import json
import sys

import pytest

from mustdrop import cli, errors
from mustdrop.eval import questions, report
from mustdrop.eval.published import rows
from mustdrop.eval.questions import Told
from mustdrop.eval.report.plot import draw
from mustdrop.eval.result import EvalResult
from test_cli import call

LLAVA = "llava-hf/llava-1.5-7b-hf"
PROVENANCE = {"versions": {"mustdrop": "0.1.0"}, "hardware": "a CPU", "seed": 0, "commit": None, "dirty": None}


def spread(mean):
    return {"mean": mean, "std": 0.25, "min": mean - 1, "max": mean + 1}


def made(method="none", keep=None, score=1800.0, **changes):
    """A result of MME with LLaVA-1.5-7B; `changes` replaces fields, "model.name" ones within a part."""
    tokens = 576.0 if keep is None else keep
    record = {
        "benchmark": "mme",
        "title": "MME",
        "scores": {} if score is None else {"total": score, "perception": 1500.0},
        "headline": "total",
        "headline_max": 2800.0,
        "metric": "perception + cognition",
        "method": method,
        "keep": keep,
        "knobs": {} if keep is None else {"keep": keep},
        "setup_sha256": "a" * 64,
        "model": {
            "name": LLAVA,
            "architecture": "LlavaForConditionalGeneration",
            "config_sha256": "c" * 64,
            "layers": 32,
            "dtype": "float16",
            "device": "cuda",
            "attention": "sdpa",
            "kernels": "triton",
        },
        "prompt": {"template": "vicuna_v1", "suffix": "", "example": "USER: ...", "max_new_tokens": 16},
        "data": {
            "source": "data",
            "split": "",
            "sha256": "d" * 64,
            "files": {"llava_mme.jsonl": "e" * 64},
            "questions": 2374,
            "asked": 2374,
            "limit": None,
            "seed": None,
        },
        "tokens": {"items": 2374, "total": spread(576), "equal": spread(tokens), "reported": spread(tokens)},
        "cost": {"flops": tokens, "flops_unpruned": 576.0, "kv_bytes": tokens, "kv_bytes_unpruned": 576.0},
        "latency": {"batch_size": 8, "prefill_ms": 100.0, "decode_ms": None},
        "time": {
            "seconds": 60.0,
            "processes": 1,
            **dict.fromkeys(("data", "vision", "prefill", "decode", "other"), 0.2),
        },
        "peak_memory_bytes": 10**9,
        "failed": [],
        "failed_share": 0.0,
        "answers": ["answers.jsonl"],
        "provenance": PROVENANCE,
        "resumed": [],
    }
    for name, value in changes.items():
        *parts, last = name.split("__")
        place = record
        for part in parts:
            place = place[part]
        place[last] = value
    return EvalResult.model_validate(record)


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *arguments: call(monkeypatch, capsys, "report", *arguments)


@pytest.fixture
def saved(tmp_path):
    """Write results into folders of their own, as `mustdrop eval` does."""

    def save(*results):
        for i, result in enumerate(results):
            (tmp_path / f"run{i}").mkdir()
            result.write(tmp_path / f"run{i}" / "result.json")
        return tmp_path

    return save


def test_share_of_the_unpruned_run_and_the_published_number_beside_it(run, saved):
    folder = saved(made("mustdrop", 64, 1530.0), made(), made("mustdrop", 192, 1710.0))
    code, out, _ = run(folder)
    lines = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    cells = {line[0].strip(): [cell.strip() for cell in line] for line in lines}
    assert code == 0
    assert list(cells) == ["unpruned", "mustdrop keep=192", "mustdrop keep=64"]
    assert cells["mustdrop keep=192"][1:3] == ["1710", "95.0%"]
    assert cells["mustdrop keep=192"][-1] == f"1787 ({1787 / 1862:.1%}) [1]"
    assert cells["mustdrop keep=64"][1:5] == ["1530", "85.0%", "64.0 ± 0.2", "11.1%"]
    assert cells["mustdrop keep=64"][-1] == f"1612 ({1612 / 1862:.1%}) [1]"
    assert cells["unpruned"][-1] == "1862 (100.0%) [1]"
    assert "[1] Published score" in out
    assert "2502.11494" in out


TIME = {"questions": 8, "method_ms": 3.25, "prefill_ms": 26.0, "device": "cuda"}


@pytest.mark.parametrize("time", [None, TIME])
def test_a_narrow_terminal_breaks_no_word(saved, monkeypatch, capsys, time):
    folder = saved(made("mustdrop", 64, 1530.0, method_time=time), made())
    monkeypatch.setattr(sys, "argv", ["mustdrop", "report", str(folder)])
    monkeypatch.setattr(cli.common.console, "_width", 80)
    cli.app(standalone_mode=False)
    table = capsys.readouterr().out.split("There is")[0]
    assert all(len(line.rstrip()) <= 80 for line in table.splitlines())
    words = table.split()
    for word in ("setting", "retained", "tokens", "FLOPs", "prefill", "decode", "published", "mustdrop", "keep=64"):
        assert word in words
    assert {"1530", "85.0%", "64.0", "±\u00a00.2", "11.1%", "1612", "(86.6%)", "[1]"} <= set(table.split(" ")) | set(
        words
    )


def test_without_an_unpruned_run_no_share_is_given_and_it_is_said(run, saved):
    code, out, _ = run(saved(made("mustdrop", 64, 1530.0)))
    assert code == 0
    assert "There is no unpruned run of this set-up" in out
    assert "85.0%" not in out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__name": "other/model", "model__config_sha256": "f" * 64}, None),
        ({"prompt__suffix": "Answer briefly."}, "prompt.suffix is 'Answer briefly.' here and '' there"),
        ({"data__limit": 100, "data__asked": 100}, "data.limit is 100 here and None there"),
        ({"data__sha256": "0" * 64}, "data.sha256"),
        ({}, "does not name"),
    ],
)
def test_other_set_ups_are_never_compared_and_what_differs_is_named(changes, told):
    other = made("mustdrop", 64, 1530.0, setup_sha256="b" * 64, **changes)
    first, second = report.group([made(), other])
    assert second.unpruned is None
    assert second.rows[0].retained is None
    assert "no unpruned run" in " ".join(second.notes)
    text = " ".join(second.notes)
    assert (told in text) if told else ("Not comparable" not in text)
    assert first.rows[0].retained == 1.0


def test_one_benchmark_is_never_compared_with_another():
    groups = report.group([made(), made("mustdrop", 64, 50.0, benchmark="textvqa")])
    assert [group.unpruned is None for group in groups] == [False, True]


def test_what_a_reader_must_know_is_noted():
    (group,) = report.group([made(score=1800.0), made(score=1790.0), made("mustdrop", 64, 900.0)])
    assert "2 unpruned runs with different scores (1800.0, 1790.0)" in " ".join(group.notes)
    assert group.rows[-1].retained == 0.5
    (group,) = report.group([made(score=None), made("mustdrop", 64, None)])
    assert [row.retained for row in group.rows] == [None, None]
    assert "server" in " ".join(group.notes)
    (group,) = report.group([made(data__limit=10, data__asked=10)])
    assert "--limit" in " ".join(group.notes)
    assert "10 of 2374 questions" in group.title
    failed = [{"name": "a.png/1", "reason": "broken"}]
    (group,) = report.group([made("mustdrop", 64, failed=failed, failed_share=0.05)])
    assert "5.0% of the questions of 'mustdrop keep=64' failed and count as wrong: first a.png/1" in group.notes[-1]


def test_runs_without_images_tokens_or_answers_have_empty_cells(run, saved):
    code, out, _ = run(saved(made(tokens=None, cost=None, latency=None)))
    assert code == 0
    assert "│ unpruned │  1800 │   100.0% │                - │     - │" in out


def told(credits, texts=None, abilities=None):
    """Questions of a run: credit, text and ability of each."""
    texts, abilities = texts or ["yes"] * len(credits), abilities or ["general"] * len(credits)
    return [
        Told(str(i), "", ability, text, credit, 70.0, 2, 1e9)
        for i, (credit, text, ability) in enumerate(zip(credits, texts, abilities, strict=True))
    ]


def test_runs_are_compared_question_by_question(tmp_path, run):
    runs = {
        "none": (made(), [1, 1, 1, 1, 0, 1, 1]),
        "mustdrop": (made("mustdrop", 64, 1500.0), [1, 1, 0, 0, 1, 1, 0]),
        "downsample": (made("downsample", 64, 1400.0), [1, 0, 0, 0, 0, 0, 1]),
    }
    abilities = ["reading"] * 4 + ["counting"] * 3
    for name, (result, credits) in runs.items():
        (tmp_path / name).mkdir()
        result.write(tmp_path / name / "result.json")
        texts = ["yes" if credit else name for credit in credits]
        questions.write(tmp_path / name / "questions.jsonl", told(map(float, credits), texts, abilities))
    _, out, _ = run(tmp_path, "--json")
    rows = {row["method"]: row for row in json.loads(out)["groups"][0]["rows"]}
    assert rows["none"]["mcnemar"] is rows["none"]["vtc"] is None
    assert rows["mustdrop"]["mcnemar"] == {"gained": 1, "lost": 3, "p": 0.625}
    assert rows["mustdrop"]["same_answer"] == pytest.approx(3 / 7)
    assert rows["mustdrop"]["vtc"] == {
        "hard": 4, "hard_right": 2, "easy": 2, "easy_right": 1, "hard_share": 0.5, "easy_share": 0.5,
    }  # fmt: skip
    assert rows["downsample"]["vtc"]["hard_share"] == 0
    assert rows["none"]["abilities"]["reading"] == {"credit": 1.0, "questions": 4}
    assert rows["mustdrop"]["abilities"] == {
        "reading": {"credit": 0.5, "questions": 4}, "counting": {"credit": pytest.approx(2 / 3), "questions": 3},
    }  # fmt: skip
    _, out, _ = run(tmp_path, "--markdown")
    assert "| mustdrop keep=64 | 42.9% | 1 | 3 | 0.62 | 50.0% of 4 | 50.0% of 2 |" in out
    assert "| setting | reading (4) | counting (3) |" in out
    code, out, _ = run(tmp_path)
    assert code == 0
    assert "By ability" in out
    (tmp_path / "mustdrop" / "questions.jsonl").write_text("{}\n")
    code, _, err = run(tmp_path)
    assert code == cli.WRONG
    assert "is not what `mustdrop eval` writes" in err


def test_answers_that_only_a_server_scores_are_compared_as_texts():
    plain, pruned = told([None] * 4, ["a", "b", "c", "d"]), told([None] * 4, ["a", "b", "c", "x"])
    (group,) = report.group([made(score=None), made("mustdrop", 64, None)], [plain, pruned])
    beside = group.rows[1].beside
    assert (beside.same, beside.apart, beside.divided) == (0.75, None, None)
    assert group.rows[1].abilities == {}
    other = told([None] * 3)
    (group,) = report.group([made(score=None), made("mustdrop", 64, None)], [plain, other])
    assert group.rows[1].beside is None  # other questions, for whatever reason


def test_means_over_benchmarks_as_in_the_last_column_of_papers(run, saved):
    pope = {"benchmark": "pope", "title": "POPE", "setup_sha256": "b" * 64}
    results = [made(), made("mustdrop", 64, 1620.0), made(score=80.0, **pope), made("mustdrop", 64, 64.0, **pope)]
    (mean,) = report.averages(report.group(results))
    assert (mean.model, mean.setting, mean.benchmarks) == (LLAVA, "mustdrop keep=64", ("mme", "pope"))
    assert mean.retained == pytest.approx(0.85)
    twice = made("mustdrop", 64, 60.0, **pope | {"setup_sha256": "9" * 64})
    plain = made(score=80.0, **pope | {"setup_sha256": "9" * 64})
    assert report.averages(report.group([*results, plain, twice])) == []  # two set-ups of POPE: neither is right
    _, out, _ = run(saved(*results))
    assert "Mean over benchmarks" in out
    assert "85.0%" in out


def test_json_and_markdown_say_what_the_table_says(run, saved):
    folder = saved(made(), made("mustdrop", 64, 1530.0, knobs={"keep": 64, "window": 2}))
    _, out, _ = run(folder, "--json")
    (group,) = json.loads(out)["groups"]
    plain, pruned = group["rows"]
    assert (plain["retained"], pruned["retained"]) == (1.0, 0.85)
    assert pruned["published"]["score"] == 1612
    assert pruned["knobs"] == {"keep": 64, "window": 2}
    assert pruned["equal_tokens"]["mean"] == 64
    _, out, _ = run(folder, "--markdown")
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "| mustdrop keep=64 window=2 | 1530 | 85.0% |" in out
    code, _, err = run(folder, "--markdown", "--json")
    assert code == cli.WRONG
    assert "exclude" in err


def test_every_published_row_finds_its_place():
    names = {"LLaVA-1.5-7B": LLAVA, "LLaVA-NeXT-7B": "llava-hf/llava-v1.6-vicuna-7b-hf"}
    for known in rows():
        keep = None if known.method == "none" else known.tokens
        run = made(known.method, keep, known.score, benchmark=known.benchmark, model__name=names[known.model])
        (row,) = report.group([run])[0].rows
        assert row.published == known


def test_thresholds_and_shares_belong_to_the_published_budget_that_they_come_out_at(run, saved):
    thresholds = {"global_threshold": 0.011, "individual_threshold": 0.01}
    near = {"tokens__equal": spread(205.0), "tokens__reported": spread(187.0)}
    by_data = made("mustdrop", None, 1700.0, knobs=thresholds, **near)
    shares = made("mustdrop", 1 / 9, 1600.0, knobs={"keep": 1 / 9}, tokens__reported=spread(63.5))
    between = made("mustdrop", None, 1650.0, knobs=thresholds, tokens__reported=spread(90.0))
    (group,) = report.group([made(), by_data, shares, between])
    found = {row.result.score: row.published and row.published.tokens for row in group.rows}
    assert found == {1800.0: 576, 1700.0: 192, 1600.0: 64, 1650.0: None}
    assert [note for note in group.notes if "individual_threshold" in note] == [
        "'mustdrop global_threshold=0.011 individual_threshold=0.01' names no number of tokens: its published number "
        "is that of 192 tokens."
    ]
    assert [note for note in group.notes if "random, uniform, downsample" in note] == [
        "At keep=11.11% there is no run of random, uniform, downsample: what the budget itself costs is not known. "
        "`mustdrop eval` takes --method several times."
    ]
    assert len(group.notes) == 4  # and that the time of the method was not measured


def test_the_time_of_the_method_has_a_column_where_a_run_has_it(run, saved):
    """A run without it has an empty cell, and a line says how to get it."""
    folder = saved(made(), made("mustdrop", 64, 1530.0, method_time=TIME), made("fastv", 64, 1400.0))
    _, out, _ = run(folder, "--markdown")
    header, _, *rows = (line.split(" | ") for line in out.splitlines() if line.startswith("| "))
    place = header.index("method ms (share of prefill)")
    assert [(row[0], row[place]) for row in rows] == [
        ("| unpruned", "-"), ("| fastv keep=64", "-"), ("| mustdrop keep=64", "3.2 (12.5%)"),
    ]  # fmt: skip
    assert "those of questions asked one by one; prefill ms is that of the run's own batches" in out
    assert "not measured in 'fastv keep=64': the same `mustdrop eval` once more, with --method-time 8" in out
    _, out, _ = run(folder, "--json")
    (group,) = json.loads(out)["groups"]
    assert [row["method_time"] for row in group["rows"]] == [None, None, TIME | {"share": 0.125}]
    _, out, _ = run(folder)
    assert "3.2 (12.5%)" in out


def test_without_the_time_of_any_method_there_is_a_line_and_no_column(run, saved):
    _, out, _ = run(saved(made(), made("mustdrop", 64, 1530.0)), "--markdown")
    assert "method ms" not in out
    assert "The time of the method was not measured in no run" not in out
    assert "The time of the method was measured in no run: the same `mustdrop eval` once more" in out


def test_a_result_of_an_older_version_is_read(tmp_path):
    whole = json.loads(made("mustdrop", 64).model_dump_json())
    assert whole.pop("method_time") is None
    (tmp_path / "result.json").write_text(json.dumps(whole))
    assert EvalResult.read(tmp_path) == made("mustdrop", 64)


def test_plot(run, saved, tmp_path):
    pytest.importorskip("matplotlib")
    folder = saved(made(), made("mustdrop", 64, 1530.0), made("mustdrop", 192, 1700.0), made("fastv", 192, 1500.0))
    code, out, _ = run(folder, "--plot", tmp_path / "new" / "accuracy.png")
    assert code == 0
    assert (tmp_path / "new" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy.png" in out
    figure = draw(report.group(report.collect([folder]).values()), tmp_path / "a.svg")
    (axes,) = figure.axes
    lines = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert lines["mustdrop"] == [192, 64]
    assert lines["mustdrop, published"] == [192, 64]
    assert lines["fastv"] == [192]


@pytest.mark.parametrize(
    ("results", "name", "text"),
    [
        ([made()], "accuracy.xyz", "png"),
        ([made()], "accuracy", "png"),
        ([made(score=None)], "accuracy.png", "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn(results, name, text, run, saved, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, err = run(saved(*results), "--plot", tmp_path / name)
    assert code == cli.WRONG
    assert text in err


def test_files_that_are_no_results(run, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.json").write_text('{"schema_version": 0}')
    (tmp_path / "broken.json").write_text("{")
    for path, text in (("none.json", "no result file"), ("empty", "no result.json"), ("old.json", "schema 1")):
        code, _, err = run(tmp_path / path)
        assert code == cli.WRONG
        assert text in err
    with pytest.raises(errors.ConfigError, match="not a result"):
        report.collect([tmp_path / "broken.json"])
    folder = saved(made(), made("mustdrop", 64))
    assert len(report.collect([folder, folder / "run0", folder / "run0" / "result.json"])) == 2  # each once


def test_the_files_of_a_real_evaluation(run, monkeypatch, capsys, tmp_path):
    common = ("eval", "scenes", "--limit", "12", "--workers", "0", "--device", "cpu")
    for method, options in (("none", ()), ("mustdrop", ("--keep", "192"))):
        out = tmp_path / method
        code, _, err = call(monkeypatch, capsys, *common, "--method", method, *options, "--out", out)
        assert code == 0, err
    code, out, _ = run(tmp_path, "--json")
    assert code == 0
    (group,) = json.loads(out)["groups"]
    plain, pruned = group["rows"]
    assert plain["retained"] == 1.0
    assert pruned["retained"] == pytest.approx(pruned["score"] / plain["score"])
    assert 190 < pruned["equal_tokens"]["mean"] <= 192
    assert plain["same_answer"] is None
    assert 0 <= pruned["same_answer"] <= 1
    apart = pruned["mcnemar"]
    assert apart["gained"] - apart["lost"] == round((pruned["score"] - plain["score"]) / 100 * 12)
    assert set(pruned["abilities"]) == {"attributes", "position", "counting"}
    assert pruned["answer"]["flops"] > 0
    assert pruned["answer"]["prompt_tokens"] < plain["answer"]["prompt_tokens"]
    assert plain["answer"]["flops"] == plain["answer"]["flops_unpruned"]
    assert plain["answer"]["tokens"] >= 2
