"""From the journal's lines to the result file: a row per model and cell, and differences on the same scenes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.common import significant
from benchmarks.quality.cells import Cell
from benchmarks.quality.intervals import difference, interval

MEASURES = ("correct", "loglik", "kl", "agreement", "same")
COSTS = ("equal_tokens", "equal_share", "flops", "kv")

Row = dict[str, Any]
Scored = dict[str, NDArray[np.float64]]  # measure -> a number per scene: the mean over its questions


def summary(lines: Sequence[Mapping[str, Any]], found: Iterable[Cell], references: Sequence[str]) -> dict[str, Any]:
    """Rows of all cells, and the references against every other method at the same budget."""
    rows: list[Row] = []
    scored: dict[tuple[Any, ...], Scored] = {}
    for model in dict.fromkeys(line["model"] for line in lines):
        for cell in found:
            own = [x for x in lines if (x["model"], x["method"], x["keep"]) == (model, *cell.key)]
            row, numbers = _row(own)
            rows.append({"model": model, "method": cell.method, "keep": cell.key[1]} | row)
            if numbers is not None:
                scored[(model, *cell.key)] = numbers
    costs = {(row["model"], row["method"], row["keep"]): row for row in rows}
    return {"rows": rows, "differences": [d for name in references for d in differences(name, scored, costs)]}


def _row(own: Sequence[Mapping[str, Any]]) -> tuple[Row, Scored | None]:
    """Numbers of one cell, or the reason why there are none: a mean over what was not refused would flatter."""
    refused = [line["cannot"] for line in own if "cannot" in line]
    if refused:
        return {"cannot": refused[0], "refused_batches": f"{len(refused)} of {len(own)}"}, None
    if not own:
        return {"cannot": "not measured yet"}, None
    lines = sorted(own, key=lambda line: str(line["batch"]))  # one order for all cells: scenes are compared in pairs
    kinds = {
        kind: {name: np.concatenate([line["answers"][kind][name] for line in lines]) for name in numbers}
        for kind, numbers in lines[0]["answers"].items()
    }
    measures = [name for name in MEASURES if all(name in numbers for numbers in kinds.values())]
    scored = {name: np.mean([numbers[name] for numbers in kinds.values()], axis=0) for name in measures}
    number = [line["scenes"] for line in lines]
    costs = {name: significant(np.average([line[name] for line in lines], weights=number)) for name in COSTS}
    row = {
        "scenes": sum(number),
        "questions": sum(len(numbers["kl"]) for numbers in kinds.values()),
        **costs,
        "most_equal_tokens": significant(max(line["most_equal_tokens"] for line in lines)),
        "seconds": round(sum(line["seconds"] for line in lines), 2),
        **{name: interval(values) for name, values in scored.items()},
        "types": {
            kind: {name: interval(numbers[name]) for name in ("correct", "loglik", "agreement") if name in numbers}
            for kind, numbers in kinds.items()
        },
    }
    return row, scored


def differences(
    reference: str, scored: Mapping[tuple[Any, ...], Scored], costs: Mapping[tuple[Any, ...], Row]
) -> list[Row]:
    """The reference minus each other method, on the same scenes; positive accuracy: the reference is better."""
    out = []
    for (model, method, keep), numbers in scored.items():
        ours = scored.get((model, reference, keep))
        if method == reference or ours is None:
            continue
        apart = {name: difference(ours[name], numbers[name]) for name in numbers}
        ends = costs[model, reference, keep], costs[model, method, keep]
        cost = {name: significant(ends[0][name] - ends[1][name]) for name in COSTS}
        row = {"model": model, "reference": reference, "method": method, "keep": keep}
        out.append(row | apart | {"cost": cost})
    return out


def show(result: Mapping[str, Any]) -> None:
    """Print the rows."""
    table = Table(title=f"Quality, split {result.get('split', 'none')}", title_justify="left")
    for header in ("model", "method", "keep", "equal", "FLOPs", "KV", "accuracy", "log-lik.", "KL", "agreement"):
        table.add_column(header)
    for row in result["rows"]:
        keep = "all" if row["keep"] is None else f"{row['keep']:.1%}"
        if "cannot" in row:
            table.add_row(row["model"], row["method"], keep, "cannot: " + row["cannot"].split(":")[0])
            continue
        numbers = [f"{row['equal_share']:.1%}", f"{row['flops']:.1%}", f"{row['kv']:.1%}"]
        shown = [
            f"{row[name]['mean']:.3f} ({row[name]['low']:.3f} to {row[name]['high']:.3f})" if name in row else ""
            for name in ("correct", "loglik", "kl", "agreement")
        ]
        table.add_row(row["model"], row["method"], keep, *numbers, *shown)
    Console(width=160).print(table)
    for row in result["differences"]:
        name = "correct" if "correct" in row else "agreement"
        apart, budget = row[name], "" if row["keep"] is None else f" at {row['keep']:.1%}"
        print(
            f"{row['model']}: {row['reference']} - {row['method']}{budget}: {name} {apart['mean']:+.3f} "
            f"({apart['low']:+.3f} to {apart['high']:+.3f})"
        )
