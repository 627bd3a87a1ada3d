"""Draw docs/images/quality.png from benchmarks/results/quality.json: `python tools/docs/figures/quality.py`.

Accuracy of every method against what it processed, and against what it computed; bands are 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[3]
TARGET = ROOT / "docs" / "images" / "quality.png"
MARKERS = "osD^v<>PX*hp"


def curves(axes: Axes, record: Mapping[str, Any], cost: str) -> None:
    """A line per method with a budget; a level for those without."""
    answered = [row for row in record["rows"] if "cannot" not in row]
    names = list(dict.fromkeys(row["method"] for row in answered if row["keep"] is not None))
    for place, name in enumerate(names):
        own = sorted((row for row in answered if row["method"] == name), key=lambda row: row[cost])
        x, score = [row[cost] for row in own], [row["correct"] for row in own]
        colour = colormaps["tab20"](2 * place % 20 + place // 10 % 2)  # the ten dark ones first
        axes.plot(x, [s["mean"] for s in score], marker=MARKERS[place % len(MARKERS)], ms=4, color=colour, label=name)
        axes.fill_between(
            x,
            [s["low"] for s in score],
            [s["high"] for s in score],
            color=colour,
            alpha=0.12 if len(names) <= 8 else 0.04,
        )
    for row in answered:
        if row["keep"] is None:
            axes.axhline(row["correct"]["mean"], color="black", linestyle=":", linewidth=1, label=row["method"])
    axes.set_xscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.set_ylim(top=1.0)


def draw(record: Mapping[str, Any]) -> Figure:
    """Both panels."""
    figure = Figure(figsize=(11, 4.8), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    curves(left, record, "equal_tokens")
    curves(right, record, "flops")
    left.set_ylabel("accuracy")
    left.set_xlabel("equal tokens (of 576)")
    right.set_xlabel("FLOPs of the prompt, share of the unpruned model's")
    ticks = sorted({round(row["equal_tokens"]) for row in record["rows"] if row.get("keep") and "cannot" not in row})
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    right.set_xticks([0.15, 0.2, 0.3, 0.5, 0.7, 1.0], ["15 %", "20 %", "30 %", "50 %", "70 %", "100 %"])
    right.minorticks_off()
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8)
    if record["split"] != "heldout":
        figure.suptitle(f"pilot: {record['split']} scenes, not the reported run", fontsize=10)
    return figure


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    draw(json.loads(options.result.read_text(encoding="utf-8"))).savefig(options.out, dpi=110)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
