"""The tables of quality, from benchmarks/results/quality.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

MARK = "\\*"
TRAINED = " \u2020"
APART = f"{TRAINED.strip()} Trained to choose tokens for this model; it stands in no comparison with the others."
OVER = f"{MARK} The decoder processes more tokens than the column says: this budget is one of the cache alone."

Table = Callable[..., str]
Record = Mapping[str, Any]


def threads(record: Record) -> str:
    """How many threads of the processor a run had."""
    return f"{record['threads']} thread{'' if record['threads'] == 1 else 's'}"


def held(record: Record) -> str:
    """Which split the questions are of; another one than the held-out one is called what it is."""
    return "held-out" if record["split"] == "heldout" else f"**{record['split']}** (not reported: a pilot)"


def setting(record: Record) -> str:
    """What was run, in a few sentences; a run on another split than the held-out one is called what it is."""
    rows = [row for row in record["rows"] if "cannot" not in row]
    versions, commit = record["versions"], str(record["commit"])[:10] + (" (dirty tree)" if record["dirty"] else "")
    first = rows[0] if rows else {"questions": 0, "scenes": 0}
    return (
        f"Bundled model, {first['questions']} questions about {first['scenes']} {held(record)} scenes (seeds "
        f"{', '.join(map(str, record['seeds']))}), one of each type about each; intervals are 95 %, bootstrapped over "
        f"scenes. {record['hardware']}, {threads(record)}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, commit {commit}." + _command(record)
    )


def _command(record: Record) -> str:
    """How long one command took, where the record says it and nothing had been measured before."""
    if "note" in record:
        return f" {record['note']}"
    if "minutes" not in record or record.get("resumed"):
        return ""
    return f" One command, {record['jobs']} processes, {record['minutes']:.0f} minutes."


def overview(record: Record, table: Table) -> str:
    """What was run, and one row per method: accuracy at every budget."""
    budgets = _budgets(record)
    cells = {(row["method"], row["keep"]): row for row in record["rows"]}
    lines = []
    for method in _methods(record):
        whole = cells.get((method, None))
        own = [cells.get((method, keep)) for keep in budgets]
        lines.append(
            [
                f"`{method}`" + trained_mark(record, method),
                "" if whole is None else _score(whole),
                *("" if r is None else _score(r) for r in own),
            ]
        )
    body = setting(record) + "\n\n" + table(["method", "all", *(f"{keep:.0%}" for keep in budgets)], lines)
    return body + notes(lines)


def trained_mark(record: Record, method: str) -> str:
    """What stands behind the name of a method that was trained to choose tokens."""
    return TRAINED if any(row.get("trained") for row in record["rows"] if row["method"] == method) else ""


def notes(lines: Sequence[Sequence[str]]) -> str:
    """What the marks in a table mean."""
    found = [note for mark, note in ((MARK, OVER), (TRAINED, APART)) if any(mark in x for line in lines for x in line)]
    return "".join(f"\n\n{note}" for note in found)


def details(record: Record, table: Table, times: Record | None = None) -> str:
    """One row per method and budget: accuracy, likelihood, fidelity, and what it cost.

    Args:
        record: the run.
        table: makes a Markdown table.
        times: what each method itself takes (`python -m benchmarks method_time`); None leaves its column out.
    """
    lines, reasons = [], []
    own = {} if times is None else _method_times(record, times)
    for row in record["rows"]:
        name, keep = f"`{row['method']}`", "all" if row["keep"] is None else f"{row['keep']:.1%}"
        if "cannot" in row:
            if row["cannot"] not in reasons:
                reasons.append(row["cannot"])
            lines.append([name, keep, f"cannot [{reasons.index(row['cannot']) + 1}]", *[""] * (7 + bool(own))])
            continue
        quality = [_interval(row["correct"]), _interval(row["loglik"], 2), _interval(row["kl"])]
        costs = [f"{row['equal_tokens']:.1f}", f"{row['flops']:.1%}", f"{row['kv']:.1%}"]
        costs += [own.get((row["method"], row["keep"]), "")] if own else []
        lines.append([name, keep, *quality, _interval(row["agreement"]), f"{row['same']['mean']:.3f}", *costs])
    header = ["method", "`keep`", "accuracy", "log-likelihood", "KL", "agreement", "same answer", "tokens per layer"]
    notes = "".join(f"\n{n}. {reason.partition('. ')[0].rstrip('.')}." for n, reason in enumerate(reasons, 1))
    header += ["FLOPs", "KV", *(["method ms"] if own else [])]
    caption = _method_time_caption(times) if times is not None and own else ""
    return table(header, lines) + ("\n" + notes if notes else "") + caption


def _method_times(record: Record, times: Record) -> dict[tuple[str, float | None], str]:
    """Method and budget -> milliseconds of the method and their share of the first token, on the model of a run."""
    return {
        (row["method"], row["keep"]): f"{row['method_ms']:.1f} ({row['share']:.0%})"
        for row in times["rows"]
        if "cannot" not in row and [row["model"]] == record["models"]
    }


def _method_time_caption(times: Record) -> str:
    """How the column of the methods' own time was measured."""
    versions, commit = times["versions"], str(times["commit"])[:10] + (" (dirty tree)" if times["dirty"] else "")
    return (
        f"\n\n*method ms*: {times['clock']} in the method's own code, and its share of the whole time to the first "
        f"token; one prompt of the {times['split']} split at a time, medians of {times['pairs']} calls, mean over the "
        f"prompts. An empty cell was not measured. {times['hardware']}, load average {times['load_average']} at the "
        f"start, torch {versions['torch']}, transformers {versions['transformers']}, commit {commit}."
    )


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


def against_the_best(record: Record, table: Table) -> str:
    """mustdrop+ minus the method that is the best other one at each budget, by accuracy and by likelihood."""
    lines = []
    rows = {(row["method"], row["keep"]): row for row in record["rows"] if "cannot" not in row}
    for keep in _budgets(record):
        # budgets of the cache alone let the decoder process everything: they are no rivals at equal tokens
        rivals = [
            row
            for row in record["differences"]
            if (row["reference"], row["keep"]) == ("mustdrop+", keep)
            and rows[row["method"], keep]["equal_share"] <= keep * 1.01
            and not rows[row["method"], keep].get("trained")
        ]
        for measure, words, digits in (("correct", "accuracy", 3), ("loglik", "log-likelihood", 2)):
            if rivals:
                best = max(rivals, key=lambda row: rows[row["method"], keep][measure]["mean"])
                apart, own = best[measure], rows["mustdrop+", keep][measure]
                verdict = "better" if apart["low"] > 0 else "worse" if apart["high"] < 0 else "no difference shown"
                lines.append(
                    [
                        *(f"{keep:.0%}", words, _interval(own, digits), f"`{best['method']}`"),
                        *(_interval(apart, digits, sign="+"), verdict, f"{best['cost']['flops']:+.1%}"),
                    ]
                )
    header = ["`keep`", "measure", "`mustdrop+`", "best other method", "difference", "it is", "FLOPs"]
    return table(header, lines) if lines else "This run does not compare mustdrop+."


def variants(record: Record, table: Table) -> str:
    """One row per composition: means over the budgets, and FLOPs at each. The best likelihood comes first."""
    budgets = _budgets(record)
    by_name: dict[str, list[Record]] = {}
    for row in record["rows"]:
        if row["keep"] is not None and "cannot" not in row:
            by_name.setdefault(row["method"], []).append(row)
    whole = {name: rows for name, rows in by_name.items() if len(rows) == len(budgets)}
    lines = []

    def mean(rows: Sequence[Record], measure: str) -> float:
        return float(sum(row[measure]["mean"] for row in rows) / len(rows))

    for name, rows in sorted(whole.items(), key=lambda item: -mean(item[1], "loglik")):
        costs = " / ".join(f"{row['flops']:.0%}" for row in sorted(rows, key=lambda row: -row["keep"]))
        each = " / ".join(f"{row['correct']['mean']:.3f}" for row in sorted(rows, key=lambda row: -row["keep"]))
        lines.append([name, each, *(f"{mean(rows, measure):.3f}" for measure in ("correct", "loglik", "kl")), costs])
    first = next(row for row in record["rows"] if "cannot" not in row)
    versions, commit = record["versions"], str(record["commit"])[:10] + (" (dirty tree)" if record["dirty"] else "")
    what = "samples of pages" if "pages" in record["models"] else "scenes"
    head = (
        f"{first['questions']} questions about {first['scenes']} {what} of the {record['split']} split (seeds "
        f"{', '.join(map(str, record['seeds']))}), at {', '.join(f'{keep:.0%}' for keep in budgets)} of the tokens; "
        f"means are over the budgets. {record['hardware']}, torch {versions['torch']}, commit {commit}."
    )
    left_out = [name for name in by_name if name not in whole]
    note = f"\n\nNot at every budget: {'; '.join(left_out)}." if left_out else ""
    header = ["composition", "accuracy at each", "accuracy", "log-likelihood", "KL", "FLOPs at each"]
    return head + "\n\n" + table(header, lines) + note


def geometry(record: Record, table: Table) -> str:
    """One row per method, geometry and budget: accuracy and likelihood, and what they are beside raw features."""
    beside = {(row["reference"], row["method"], row["keep"]): row for row in record["differences"]}
    lines = []
    for row in record["rows"]:
        if row["keep"] is None or "cannot" in row:
            continue
        name, kind = row["method"].split("; ")
        apart = beside.get((f"{name}; raw", row["method"], row["keep"]))
        lines.append(
            [
                *(f"`{name}`", kind, f"{row['keep']:.0%}"),
                *(_interval(row["correct"]), _interval(row["loglik"], 2)),
                *(
                    "" if apart is None else _interval(_minus(apart[m]), n, "+")
                    for m, n in (("correct", 3), ("loglik", 2))
                ),
            ]
        )
    header = ["method", "`geometry`", "`keep`", "accuracy", "log-likelihood", "accuracy beside raw", "log-likelihood"]
    return setting(record) + "\n\n" + table(header, lines)


def _minus(apart: Record) -> Record:
    """Of the reference minus another, the other minus the reference."""
    return {"mean": -apart["mean"], "low": -apart["high"], "high": -apart["low"]}


def fixed(results: Mapping[str, Record], table: Table) -> str:
    """`mustdrop` before and after its counts were fixed: accuracy, and FLOPs of the prompt, at each budget."""
    new, old = results["quality_fixed"], results["quality_earlier"]
    lines = []
    for name, record in (("as measured above", old), ("with fixed counts", new)):
        rows = [row for row in record["rows"] if row["method"] == "mustdrop" and row["keep"] in _budgets(new)]
        rows.sort(key=lambda row: -row["keep"])
        each = (" / ".join(f"{row[what]['mean']:.3f}" for row in rows) for what in ("correct", "loglik", "kl"))
        lines.append([name, *each, " / ".join(f"{row['flops']:.0%}" for row in rows), str(record["commit"])[:10]])
    budgets = " / ".join(f"{keep:.0%}" for keep in _budgets(new))
    header = [f"`mustdrop` at {budgets}", "accuracy", "log-likelihood", "KL", "FLOPs of the prompt", "commit"]
    return table(header, lines)


def _methods(record: Record) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in record["rows"]))


def _budgets(record: Record) -> Sequence[float]:
    return sorted({row["keep"] for row in record["rows"] if row["keep"] is not None}, reverse=True)


def _score(row: Record) -> str:
    if "cannot" in row:
        return "cannot"
    over = row["keep"] is not None and row["equal_share"] > row["keep"] * 1.01
    return _interval(row["correct"]) + (f" {MARK}" if over else "")


def _interval(value: Mapping[str, float], digits: int = 3, sign: str = "") -> str:
    mean, low, high = (f"{value[name]:{sign}.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
