"""The tables of quality on a bundled model, from benchmarks/results/quality.json and quality_pages.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import quality_table

BASELINES = ("none", "random", "uniform", "downsample")  # stand first: what a budget costs whoever chooses
OWN = "mustdrop+"
LEVEL = 0.05
MARK = "\\*"
#: Name of a model in its result file -> what it is called, and what it is asked about.
ASKED = {"bundled": ("The bundled LLaVA", "scenes"), "pages": ("The bundled Qwen3-VL", "samples")}

Table = Callable[..., str]
Record = Mapping[str, Any]


def setting(record: Record) -> str:
    """What was run, in a few sentences."""
    first = next(row for row in record["rows"] if "cannot" not in row)
    versions, commit = record["versions"], str(record["commit"])[:10] + (" (dirty tree)" if record["dirty"] else "")
    kind = quality_table.held(record)
    name, things = ASKED[record["models"][0]]
    return (
        f"{name}, {first['questions']} questions about {first['scenes']} {kind} {things} (seeds "
        f"{', '.join(map(str, record['seeds']))}); intervals are 95 %, bootstrapped over {things}. "
        f"{record['hardware']}, {quality_table.threads(record)}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, commit {commit}." + (f" {record['note']}" if "note" in record else "")
    )


def overview(record: Record, table: Table) -> str:
    """Accuracy at every budget, one row per method; the baselines first."""
    rows = _rows(record)
    marks = {method: quality_table.trained_mark(record, method) for method in _methods(record)}
    lines = [[f"`{method}`{mark}", *_cells(rows, method, _budgets(record))] for method, mark in marks.items()]
    body = setting(record) + "\n\n" + table(["method", "no budget", *_names(record)], lines)
    return body + quality_table.notes(lines) + _refusals(record)


def _cells(rows: Mapping[Any, Record], method: str, budgets: Sequence[float]) -> list[str]:
    out = []
    for keep in (None, *budgets):
        row = rows.get((method, keep))
        if row is None:
            out.append("")
        elif "cannot" in row:
            out.append("cannot")
        else:
            out.append(_interval(row["correct"]) + (f" {MARK}" if over_budget(row) else ""))
    return out


def _refusals(record: Record) -> str:
    """Why methods cannot, in a line for each reason."""
    found: dict[str, list[str]] = {}
    for row in record["rows"]:
        if "cannot" in row:
            reason = row["cannot"].split(". ")[0].split(";")[0]
            reason = reason if "impossible" not in reason else "the first filter comes too late for this budget"
            names = found.setdefault(reason, [])
            if row["method"] not in names:
                names.append(row["method"])
    lines = [f"- {', '.join(f'`{name}`' for name in names)}: {reason}." for reason, names in found.items()]
    return "\n\n*Cannot*:\n\n" + "\n".join(lines) if lines else ""


def beside(record: Record, table: Table) -> str:
    """Each method beside the unpruned model: same answers, the exact test, VTC-Bench's groups, cost of an answer."""
    lines = []
    rows = _rows(record)
    whole = rows["none", None]
    for method in _methods(record):
        for keep in (None, *_budgets(record)):
            row = rows.get((method, keep))
            if row is None or "cannot" in row:
                continue
            apart, divided = row.get("against_unpruned"), row.get("vtc")
            test = apart["mcnemar"] if apart else None
            answer = row["answer"]
            lines.append(
                [
                    f"`{method}`" + quality_table.trained_mark(record, method),
                    "–" if keep is None else f"{keep:.0%}",
                    f"{row['same']['mean']:.3f}",
                    "" if test is None else f"{test['gained']} / {test['lost']}",
                    "" if test is None else f"{test['p']:.2g}",
                    *(_share(divided and divided[f"{group}_share"]) for group in ("hard", "easy")),
                    f"{answer['prompt_tokens']:.1f}",
                    f"{answer['tokens']:.2f}",
                    f"{answer['flops'] / whole['answer']['flops']:.1%}",
                    f"{row['kv']:.1%}",
                ]
            )
    header = ["method", "`keep`", "same answer", "gained / lost", "McNemar p", "A", "B"]
    return table([*header, "prompt tokens", "answer tokens", "FLOPs of an answer", "KV"], lines) + _sizes(record)


def _sizes(record: Record) -> str:
    sizes = {
        row["keep"]: (row["vtc"]["hard"], row["vtc"]["easy"])
        for row in record["rows"]
        if "cannot" not in row and row.get("vtc")
    }
    told = "; ".join(f"{keep:.0%}: {hard} and {easy}" for keep, (hard, easy) in sorted(sizes.items(), reverse=True))
    return f"\n\nQuestions in groups A and B: {told}." if told else ""


def abilities(record: Record, table: Table) -> str:
    """Accuracy by ability, one row per method and budget."""
    rows = _rows(record)
    names = list(rows["none", None]["abilities"])
    header = [f"{name} ({rows['none', None]['abilities'][name]['questions']})" for name in names]
    lines = []
    for method in _methods(record):
        for keep in (None, *_budgets(record)):
            row = rows.get((method, keep))
            if row is not None and "cannot" not in row:
                values = [f"{row['abilities'][name]['correct']['mean']:.2f}" for name in names]
                name = f"`{method}`" + quality_table.trained_mark(record, method)
                lines.append([name, "–" if keep is None else f"{keep:.0%}", *values])
    return table(["method", "`keep`", *header], lines)


def against(record: Record, table: Table) -> str:
    """mustdrop+ and each other method at the same budget: difference, exact test, FLOPs."""
    lines = []
    rows = _rows(record)
    for row in record["differences"]:
        other = rows[row["method"], row["keep"]]
        if row["reference"] != OWN or row["method"] == "none" or over_budget(other) or other.get("trained"):
            continue
        test = row["mcnemar"]
        gain = test["gained"] - test["lost"]
        verdict = "no difference shown" if test["p"] > LEVEL else "better" if gain > 0 else "worse"
        lines.append(
            [
                f"`{row['method']}`",
                f"{row['keep']:.0%}",
                _interval(row["correct"], sign="+"),
                f"{test['gained']} / {test['lost']}",
                f"{test['p']:.2g}",
                verdict,
                f"{row['cost']['flops']:+.1%}",
            ]
        )
    lines.sort(key=lambda line: (line[0], -float(line[1].rstrip("%"))))
    header = ["`mustdrop+` minus", "`keep`", "accuracy", "gained / lost", "McNemar p", "it is", "FLOPs"]
    return table(header, lines) if lines else "This run does not compare mustdrop+."


def placed(method: str) -> str:
    """The name of a composition; result files say "behind" for after the encoder."""
    return re.sub(r"\bbehind\b", "after the encoder", method)


def inside(record: Record, table: Table) -> str:
    """Compositions inside the encoder, each beside the same rule after it: accuracy, what was retained, FLOPs."""
    found, lines = _rows(record), []
    apart = {(row["reference"], row["method"], row["keep"]): row for row in record["differences"]}
    for method in dict.fromkeys(row["method"] for row in record["rows"]):
        behind = next(iter(name for name in _beside(record) if name.split("; ")[0].split(" ")[0] in method), "")
        for keep in (None, *_budgets(record)):
            row = found.get((method, keep))
            if row is None or "cannot" in row:
                continue
            against = apart.get((behind, method, keep))
            test = None if against is None else against["mcnemar"]
            lines.append(
                [
                    "nothing is dropped" if keep is None else placed(method),
                    "all" if keep is None else f"{keep:.0%}",
                    f"{row['equal_share']:.1%}",
                    _interval(row["correct"]),
                    f"{row['loglik']['mean']:.2f}",
                    f"{row['flops']:.1%}",
                    "" if test is None else f"{test['lost']} / {test['gained']}, p {test['p']:.2g}",
                ]
            )
    header = ["composition", "`keep`", "retained", "accuracy", "log-likelihood", "FLOPs of the prompt"]
    return setting(record) + "\n\n" + table([*header, "gained / lost beside *after the encoder*"], lines)


def tolerance(record: Record, table: Table) -> str:
    """How much patches that count as equal may differ: what is retained, accuracy, what is lost beside unpruned."""
    lines = []
    for row in record["rows"]:
        test = row.get("against_unpruned", {}).get("mcnemar")
        lines.append(
            [
                "nothing is dropped" if test is None else row["method"],
                f"{row['equal_share']:.1%}",
                f"{row['flops']:.1%}",
                _interval(row["correct"]),
                "" if test is None else f"{test['gained']} / {test['lost']}, p {test['p']:.2g}",
            ]
        )
    header = ["`pixelprune`", "retained", "FLOPs of the prompt", "accuracy", "gained / lost beside the unpruned"]
    return setting(record) + "\n\n" + table(header, lines)


def _beside(record: Record) -> list[str]:
    """The compositions that others are compared with."""
    return list(dict.fromkeys(row["reference"] for row in record["differences"]))


def _rows(record: Record) -> dict[tuple[str, float | None], Record]:
    return {(row["method"], row["keep"]): row for row in record["rows"]}


def _methods(record: Record) -> list[str]:
    names = list(dict.fromkeys(row["method"] for row in record["rows"]))
    return [*(name for name in BASELINES if name in names), *sorted(name for name in names if name not in BASELINES)]


def _budgets(record: Record) -> list[float]:
    return sorted({row["keep"] for row in record["rows"] if row["keep"] is not None}, reverse=True)


def _names(record: Record) -> list[str]:
    return [f"{keep:.0%}" for keep in _budgets(record)]


def over_budget(row: Record) -> bool:
    """Whether the decoder processes more tokens than the budget: it is one of the cache alone."""
    return "cannot" not in row and row["keep"] is not None and row["equal_share"] > row["keep"] * 1.02


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _interval(value: Mapping[str, float], sign: str = "") -> str:
    mean, low, high = (f"{value[name]:{sign}.3f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
