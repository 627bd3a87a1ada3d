"""Tables of docs/evaluate.md: published scores and the commands that ask for them, and measured scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import quality_table

FILE = Path(__file__).parents[2] / "src" / "mustdrop" / "eval" / "published.json"
MODEL, HUB = "LLaVA-1.5-7B", "llava-hf/llava-1.5-7b-hf"
METHOD, BUDGETS = "mustdrop", (192, 128, 64)
TITLES = {
    "gqa": "GQA",
    "mmbench": "MMBench",
    "mmbench-cn": "MMBench-CN",
    "mme": "MME",
    "pope": "POPE",
    "scienceqa": "ScienceQA",
    "vqav2": "VQAv2",
    "textvqa": "TextVQA",
    "vizwiz": "VizWiz",
    "ocrbench": "OCRBench",
}
Table = Callable[[Sequence[object], Iterable[Sequence[object]]], str]


def _rows() -> tuple[dict[str, Any], dict[tuple[str, int], dict[str, float]]]:
    found = json.loads(FILE.read_text(encoding="utf-8"))[MODEL]
    columns = found["columns"]
    return found, {(row[1], row[0]): dict(zip(columns, row[2:], strict=True)) for row in found["rows"]}


def scores(table: Table) -> str:
    """The published scores: a row per benchmark, unpruned and at each budget."""
    found, rows = _rows()
    unpruned = next(row for (method, _), row in rows.items() if method == "none")
    lines = [
        (
            f"{TITLES[name]} (`{name}`)",
            unpruned[name],
            *(f"{rows[METHOD, t][name]} ({rows[METHOD, t][name] / unpruned[name]:.1%})" for t in BUDGETS),
        )
        for name in found["columns"]
    ]
    header = ("benchmark", "unpruned, 576 tokens", *(f"MustDrop, {t}" for t in BUDGETS))
    return f"{table(header, lines)}\n\nSource: {found['source']}."


def commands() -> str:
    """One command for every published row, with what to expect after it."""
    found, rows = _rows()
    start = f"python -m mustdrop eval {{}} --model {HUB} --method"
    blocks = [
        "\n".join(f"{start.format(name)} {METHOD} --keep {t}  # {rows[METHOD, t][name]}" for name in found["columns"])
        for t in BUDGETS
    ]
    return "```console\n" + "\n\n".join(blocks) + "\n```"


def scenes(record: Mapping[str, Any], table: Table) -> str:
    """The bundled model on its own benchmark, one row per method and budget."""
    rows = []
    for row in record["rows"]:
        time = row["time"]
        model = sum(time[part] for part in ("vision", "prefill", "decode"))
        score, equal = f"{row['scores']['accuracy']:.1f}", f"{row['tokens']['equal']['mean']:.1f}"
        shares = (f"{row['flops_ratio']:.1%}", f"{row['kv_ratio']:.1%}", f"{model:.1%}", f"{time['data']:.1%}")
        rows.append((f"`{row['method']}`", row["keep"] or "all", score, equal, *shares))
    header = (
        "method",
        "`keep`",
        "accuracy",
        "tokens per layer",
        "FLOPs",
        "KV cache",
        "time in the model",
        "waiting for data",
    )
    versions = record["versions"]
    return (
        f"{record['questions']} questions about held-out scenes (seed {record['seed']}), {record['hardware']}, "
        f"{quality_table.threads(record)}, torch {versions['torch']}, transformers {versions['transformers']}, commit "
        f"{str(record['commit'])[:10]}.\n\n" + table(header, rows)
    )
