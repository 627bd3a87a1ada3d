"""The benchmark of the evaluation, and the tables of its page."""

from __future__ import annotations

import json

from benchmarks import __main__ as command

import evaluation_tables
import generate


def test_a_row_per_budget(tmp_path):
    out = tmp_path / "evaluation.json"
    assert command.main(["evaluation", "--questions", "8", "--workers", "0", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [(row["method"], row["keep"]) for row in record["rows"]] == [
        ("none", None),
        ("mustdrop", 192),
        ("mustdrop", 128),
        ("mustdrop", 64),
    ]
    assert next(row["tokens"]["equal"]["mean"] for row in record["rows"]) == 576
    shown = evaluation_tables.scenes(record, generate.table)
    assert shown.count("\n| `mustdrop` |") == 3


def test_every_published_row_has_its_command():
    lines = [line for line in evaluation_tables.commands().splitlines() if line.startswith("python")]
    assert len(lines) == 10 * 3
    said = "python -m mustdrop eval mme --model llava-hf/llava-1.5-7b-hf --method mustdrop --keep 192  # 1787"
    assert said in lines
    assert "| MME (`mme`) | 1862 | 1787 (96.0%) | 1745 (93.7%) | 1612 (86.6%) |" in evaluation_tables.scores(
        generate.table
    )
