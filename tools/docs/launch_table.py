"""The tables of what a call starts, from benchmarks/results/launches.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

COLUMNS = (
    ("launches", "prefill", "more_launches"),
    ("host operations", "prefill", "own_host"),
    ("waits", "prefill", "own_waits"),
    ("copies", "prefill", "own_copies"),
    ("launches a step", "step", "more_launches"),
    ("waits a step", "step", "own_waits"),
)


def render(record: Mapping[str, Any], table: Callable[..., str]) -> str:
    """One table per cache: what each method adds to the untouched model, at every batch."""
    batches = sorted({row["batch"] for row in record["rows"]})
    where = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "transformers"))
    text = [
        f"A LLaVA with {record['layers']} decoder layers and {record['blocks']} encoder blocks, "
        f"{record['vision']} vision and {record['text']} text tokens, `keep={record['keep']}` "
        f"({where}, commit {str(record['commit'])[:10]}). "
        f"Figures at batch {' / '.join(str(batch) for batch in batches)}."
    ]
    for cache in dict.fromkeys(row["cache"] for row in record["rows"]):
        rows: dict[str, list[Mapping[str, Any]]] = {}
        for row in record["rows"]:
            if row["cache"] == cache:
                rows.setdefault(row["method"], []).append(row)
        untouched = rows.pop("untouched")
        whole = " / ".join(f"{row['prefill']['launches']:,}" for row in untouched)
        step = " / ".join(f"{row['step']['launches']:,}" for row in untouched)
        text.append(f"**{cache} cache.** Untouched: {whole} launches for a prompt, {step} for a decode step.")
        body = [[f"`{method}`", *_cells(own)] for method, own in rows.items()]
        text.append(table(["method adds", *(name for name, *_ in COLUMNS)], body))
    return "\n\n".join(text)


def _cells(rows: list[Mapping[str, Any]]) -> list[str]:
    if any("refused" in row for row in rows):
        return ["refused", *[""] * (len(COLUMNS) - 1)]
    return [" / ".join(f"{row[part][figure]:,}" for row in rows) for _, part, figure in COLUMNS]


def host_time(record: Mapping[str, Any], table: Callable[..., str]) -> str:
    """Processor time of a first token with tiny widths, beside the untouched model."""
    text = (
        f"{record['hardware']}; torch {record['versions']['torch']}, commit {str(record['commit'])[:10]}; "
        f"{record['vision']} vision tokens, `keep={record['keep']}`, {record['pairs']} pairs; the median of "
        "their ratios, and the quartiles. In brackets: without the kernels' mathematics, which a GPU does."
    )
    batches = sorted({row["batch"] for row in record["rows"]})
    rows: dict[str, list[str]] = {}
    for row in record["rows"]:
        low, high = row["quartiles"]
        plain = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        apart = f" [{row['ratio_without_kernels']:.2f}]" if "ratio_without_kernels" in row else ""
        rows.setdefault(row["method"], []).append(plain + apart)
    header = ["method", *(f"batch {batch}" for batch in batches)]
    return text + "\n\n" + table(header, [[f"`{method}`", *cells] for method, cells in rows.items()])
