"""The table of docs/kernels.md: what the compilers made of every kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def launches(record: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """A sentence, and one row per launch with a column per target, from `benchmarks/results/kernels_aot.json`."""
    targets = list(record["shared_limit"])
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in record["rows"]:
        cell = f"{row['registers']} / {row['shared'] / 1024:.1f}"
        cells.setdefault((row["case"], row["kernel"]), {})[row["target"]] = cell
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "triton"))
    spilled = sum(row["spills"] > 0 for row in record["rows"])
    sentence = (
        f"Registers per thread / KiB of shared memory per program ({versions}); {len(record['rows'])} compilations, "
        f"of which {spilled or 'none'} spills. – : not launched there, the program before it does the work."
    )
    rows = [[case, f"`{kernel}`", *(by.get(t, "–") for t in targets)] for (case, kernel), by in cells.items()]
    return sentence, ["operation and size", "kernel", *targets], rows
