"""The benchmark of the methods' own time: rows of every cell, and how the documents show them."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import method_time

import generate
import quality_table


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    out = tmp_path_factory.mktemp("times") / "method_time.json"
    some = ["--method", "none", "--method", "divprune", "--method", "fastv", "--pairs", "1"]
    assert command.main(["method_time", *some, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_a_row_for_each_model_method_and_budget(record):
    assert torch.get_num_threads() == record["threads"] == 1
    assert record["split"] == "train"
    found = {(row["model"], row["method"], row["keep"]): row for row in record["rows"]}
    assert set(found) == {
        (model, method, None if method == "none" else round(keep, 6))
        for model, budgets in method_time.BUDGETS.items()
        for method in ("none", "divprune", "fastv")
        for keep in budgets
    }
    for row in found.values():
        if "cannot" not in row:
            assert 0 < row["method_ms"] < row["prefill_ms"]
            assert row["share"] == pytest.approx(row["method_ms"] / row["prefill_ms"], rel=0.01)
    assert "impossible" in found["bundled", "fastv", round(1 / 9, 6)]["cannot"]


def test_the_medians_of_each_prompt_are_averaged(monkeypatch):
    pairs = iter([[(1.0, 4.0, 8.0), (2.0, 6.0, 9.0), (9.0, 90.0, 99.0)], [(4.0, 10.0, 1.0)]])
    monkeypatch.setattr(method_time, "_pairs", lambda *_: next(pairs))

    class Patched:
        method, key = "some", ("some", 0.5)

        def patched(self, model, seed):
            return torch.no_grad()

    row = method_time.measure(None, None, [{}, {}], Patched(), 3, float)
    assert (row["method_ms"], row["prefill_ms"], row["unpatched_ms"]) == (3000, 8000, 5000)
    assert (row["share"], row["ratio"]) == (0.375, 1.6)


def test_the_table_of_quality_has_the_column_where_it_was_measured(record):
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    quality = dict.fromkeys(("correct", "loglik", "kl", "agreement", "same"), interval)
    costs = {"equal_tokens": 64.0, "flops": 0.2, "kv": 0.1}
    rows = [{"method": "divprune", "keep": keep} | quality | costs for keep in (round(1 / 9, 6), round(1 / 18, 6))]
    shown = quality_table.details({"models": ["bundled"], "rows": rows}, generate.table, record)
    header, _, measured, other, *rest = shown.splitlines()
    assert header.endswith("| method ms |")
    row = next(row for row in record["rows"] if (row["model"], row["keep"]) == ("bundled", round(1 / 9, 6))
               and row["method"] == "divprune")  # fmt: skip
    assert measured.endswith(f"| {row['method_ms']:.1f} ({row['share']:.0%}) |")
    assert other.endswith("| 10.0% |  |")
    assert record["hardware"] in " ".join(rest)
    assert "method ms" not in quality_table.details({"models": ["bundled"], "rows": rows}, generate.table)
