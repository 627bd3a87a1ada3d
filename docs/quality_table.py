"""The tables of quality, from benchmarks/results/quality.json and quality_families.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Table = Callable[..., str]
Record = Mapping[str, Any]


def setting(record: Record) -> str:
    """What was run, in a few sentences; a run on another split than the held-out one is called what it is."""
    rows = [row for row in record["rows"] if "cannot" not in row]
    versions, commit = record["versions"], str(record["commit"])[:10] + (" (dirty tree)" if record["dirty"] else "")
    first = rows[0] if rows else {"questions": 0, "scenes": 0}
    kind = "held-out" if record["split"] == "heldout" else f"**{record['split']}** (a pilot: not the reported run)"
    return (
        f"Bundled model, {first['questions']} questions about {first['scenes']} {kind} scenes (seeds "
        f"{', '.join(map(str, record['seeds']))}), one of each type about each; intervals are 95 %, bootstrapped over "
        f"scenes. {record['hardware']}, {record['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, commit {commit}."
    )


def overview(record: Record, table: Table) -> str:
    """One row per method: accuracy at every budget."""
    budgets = _budgets(record)
    cells = {(row["method"], row["keep"]): row for row in record["rows"]}
    lines = []
    for method in _methods(record):
        whole = cells.get((method, None))
        own = [cells.get((method, keep)) for keep in budgets]
        lines.append(
            [f"`{method}`", "" if whole is None else _score(whole), *("" if r is None else _score(r) for r in own)]
        )
    return table(["method", "all", *(f"{keep:.0%}" for keep in budgets)], lines)


def details(record: Record, table: Table) -> str:
    """One row per method and budget: accuracy, likelihood, fidelity, and what it cost."""
    lines, reasons = [], []
    for row in record["rows"]:
        name, keep = f"`{row['method']}`", "all" if row["keep"] is None else f"{row['keep']:.1%}"
        if "cannot" in row:
            if row["cannot"] not in reasons:
                reasons.append(row["cannot"])
            lines.append([name, keep, f"cannot [{reasons.index(row['cannot']) + 1}]", *[""] * 7])
            continue
        quality = [_interval(row["correct"]), _interval(row["loglik"], 2), _interval(row["kl"])]
        costs = [f"{row['equal_tokens']:.1f}", f"{row['flops']:.1%}", f"{row['kv']:.1%}"]
        lines.append([name, keep, *quality, _interval(row["agreement"]), f"{row['same']['mean']:.3f}", *costs])
    header = ["method", "`keep`", "accuracy", "log-likelihood", "KL", "agreement", "same answer", "equal tokens"]
    notes = "".join(f"\n{n}. {reason}" for n, reason in enumerate(reasons, 1))
    return table([*header, "FLOPs", "KV"], lines) + ("\n" + notes if notes else "")


def types(record: Record, table: Table) -> str:
    """Accuracy per question type, one row per method and budget."""
    rows = [row for row in record["rows"] if "cannot" not in row]
    lines = [
        [
            f"`{row['method']}`",
            "all" if row["keep"] is None else f"{row['keep']:.1%}",
            *(f"{row['types'][kind]['correct']['mean']:.2f}" for kind in record["types"]),
        ]
        for row in rows
    ]
    halves = [(kind["correct"]["high"] - kind["correct"]["low"]) / 2 for row in rows for kind in row["types"].values()]
    note = f"Intervals are up to {max(halves, default=0):.2f} to either side; they are in the result file."
    return table(["method", "`keep`", *record["types"]], lines) + "\n\n" + note


def differences(record: Record, table: Table) -> str:
    """The reference methods minus the others, on the same scenes."""
    lines = []
    for row in record["differences"]:
        apart = row["correct"]
        verdict = "better" if apart["low"] > 0 else "worse" if apart["high"] < 0 else "no difference shown"
        keep = "all" if row["keep"] is None else f"{row['keep']:.1%}"
        lines.append(
            [f"`{row['reference']}`", f"`{row['method']}`", keep, _interval(apart, sign="+"), verdict]
            + [_interval(row[name], sign="+") for name in ("loglik", "kl")]
        )
    header = ["method", "minus", "`keep`", "accuracy", "it is", "log-likelihood", "KL"]
    return table(header, lines) if lines else "This run compares no methods."


def families(record: Record, table: Table) -> str:
    """Agreement and KL of tiny random models, one row per family and method, budgets side by side."""
    budgets = _budgets(record)
    cells = {(row["model"], row["method"], row["keep"]): row for row in record["rows"]}
    lines = []
    for model in record["models"]:
        for method in _methods(record):
            own = [cells.get((model, method, keep)) for keep in budgets]
            if any(row is not None for row in own):
                lines.append([f"`{model}`", f"`{method}`", *(_fidelity(row) for row in own)])
    return table(["model", "method", *(f"{keep:.0%}" for keep in budgets)], lines)


def _methods(record: Record) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in record["rows"]))


def _budgets(record: Record) -> Sequence[float]:
    return sorted({row["keep"] for row in record["rows"] if row["keep"] is not None}, reverse=True)


def _score(row: Record) -> str:
    return "cannot" if "cannot" in row else _interval(row["correct"])


def _fidelity(row: Record | None) -> str:
    if row is None:
        return ""
    return "cannot" if "cannot" in row else f"{row['agreement']['mean']:.2f}, KL {row['kl']['mean']:.3f}"


def _interval(value: Mapping[str, float], digits: int = 3, sign: str = "") -> str:
    mean, low, high = (f"{value[name]:{sign}.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
