"""Draw docs/images/speed.png from benchmarks/results: `python tools/docs/figures/speed.py`.

Left: what scoring costs as vision tokens grow. Right: the prefill's speed-up beside what its FLOPs promise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[3]
TARGET = ROOT / "docs" / "images" / "speed.png"


def growth(axes: Axes, record: Mapping[str, Any]) -> None:
    """Time of scoring, kernel and reference, against vision tokens; the dotted line is in proportion to them."""
    points = record["growth"]
    tokens = [point["vision_tokens"] for point in points]
    for name, label in (("eager", "reference"), ("kernel", "kernel")):
        axes.plot(tokens, [1e6 * point[name]["median"] for point in points], marker="o", ms=4, label=label)
    last = 1e6 * points[-1]["kernel"]["median"]
    axes.plot(tokens, [last * n / tokens[-1] for n in tokens], color="grey", linestyle=":", label="in proportion")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens], rotation=30)
    axes.minorticks_off()
    axes.set_xlabel("vision tokens (64 text tokens)")
    axes.set_ylabel("microseconds")
    axes.set_title(record["hardware"], fontsize=10)
    axes.legend()
    axes.grid(alpha=0.3)


def prefill(axes: Axes, record: Mapping[str, Any]) -> None:
    """The measured speed-up against the ratio of FLOPs; hollow marks are the bare layers."""
    rows = [(model["model"], row) for model in record["models"] for row in model["rows"]]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, row in rows:
        groups.setdefault(f"{name}, {row['attention']}, batch {row['batch']}", []).append(row["prefill"])
    for place, (label, points) in enumerate(groups.items()):
        ordered = sorted(points, key=lambda point: point["flops_ratio"])
        x, colour = [point["flops_ratio"] for point in ordered], f"C{place}"
        axes.plot(x, [p["speed_up"]["median"] for p in ordered], marker="o", ms=4, color=colour, label=label)
        axes.plot(x, [p["of_bare_layers"]["median"] for p in ordered], "o", ms=6, mfc="none", color=colour)
    top = max(row["prefill"]["flops_ratio"] for _, row in rows)
    axes.plot([1, top], [1, top], color="grey", linestyle=":", label="the FLOPs ratio")
    axes.set_xlabel("prefill: ratio of FLOPs")
    axes.set_ylabel("prefill: speed-up (hollow: bare layers)")
    axes.set_title(record["hardware"], fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def main() -> None:
    """Read the result files, draw, save."""
    results = ROOT / "benchmarks" / "results"
    kernels, serving = (json.loads((results / f"{name}_cuda.json").read_text()) for name in ("kernels", "serving"))
    figure = Figure(figsize=(11, 4.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    growth(left, kernels)
    prefill(right, serving)
    figure.savefig(TARGET, dpi=130)


if __name__ == "__main__":
    main()
