"""Draw docs/images/quality.png and quality_pages.png from benchmarks/results: `python tools/docs/figures/quality.py`.

Accuracy of every method against what it processed, and against what it computed. A handful of lines have a colour and a
band (95 % intervals): the baselines, the package's own methods, and the best others. The rest is grey.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[3]
NAMES = ("quality", "quality_pages")
BASELINES, OWN = ("random", "uniform", "downsample"), ("mustdrop+", "mustdrop")
BEST = 3  # other methods in colour
MARKERS = "osD^v<>P"


def shown(record: Mapping[str, Any]) -> list[str]:
    """The methods in colour: the package's own, the baselines, and the others that are best over all budgets."""
    rows = [row for row in record["rows"] if "cannot" not in row and row["keep"] is not None]
    budgets = {row["keep"] for row in rows}
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row["equal_share"] <= row["keep"] * 1.02:  # others limit the cache alone
            scores.setdefault(row["method"], []).append(row["correct"]["mean"])
    named = [name for name in (*OWN, *BASELINES) if name in scores]
    whole = [name for name, own in scores.items() if len(own) == len(budgets) and name not in named]
    return named + sorted(whole, key=lambda name: -sum(scores[name]))[:BEST]


def curves(axes: Axes, record: Mapping[str, Any], cost: str, chosen: Sequence[str]) -> None:
    """A line per method with a budget; a level for the unpruned model."""
    answered = [row for row in record["rows"] if "cannot" not in row]
    names = list(dict.fromkeys(row["method"] for row in answered if row["keep"] is not None))
    others = [name for name in names if name not in chosen]
    for name in (*others, *chosen):
        own = sorted((row for row in answered if row["method"] == name), key=lambda row: row[cost])
        x, score = [row[cost] for row in own], [row["correct"] for row in own]
        if name in others:
            label = "all others" if name == others[0] else None
            axes.plot(x, [s["mean"] for s in score], color="0.75", linewidth=0.9, zorder=1, label=label)
            continue
        place = chosen.index(name)
        look = {
            "color": colormaps["tab10"](place + (place >= 7)),
            "zorder": 3,
            "linestyle": "--" if name in BASELINES else "-",
        }
        axes.plot(x, [s["mean"] for s in score], marker=MARKERS[place % len(MARKERS)], ms=4, label=name, **look)
        axes.fill_between(
            x, [s["low"] for s in score], [s["high"] for s in score], color=look["color"], alpha=0.08, zorder=2
        )
    for row in answered:
        if row["keep"] is None:
            axes.axhline(row["correct"]["mean"], color="black", linestyle=":", linewidth=1, label="unpruned")
    axes.set_xscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.set_ylim(top=1.0)


def draw(record: Mapping[str, Any]) -> Figure:
    """Both panels."""
    figure = Figure(figsize=(11, 4.8), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    chosen = shown(record)
    curves(left, record, "equal_share", chosen)
    curves(right, record, "flops", chosen)
    left.set_ylabel("accuracy")
    left.set_xlabel("equal tokens, share of the vision tokens")
    right.set_xlabel("FLOPs of the prompt, share of the unpruned model's")
    ticks = sorted({row["keep"] for row in record["rows"] if row.get("keep")})
    left.set_xticks([*ticks, 1.0], [*(f"{tick:.0%}" for tick in ticks), "100%"])
    left.minorticks_off()
    least = min(row["flops"] for row in record["rows"] if "cannot" not in row)
    marks = (0.15, 0.2, 0.3, 0.5, 0.7, 1.0) if least < 0.4 else (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    right.set_xticks(marks, [f"{mark:.0%}" for mark in marks])
    right.minorticks_off()
    handles, labels = left.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i] == "all others", labels[i] == "unpruned"))
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside right center", fontsize=8)
    if record["split"] != "heldout":
        figure.suptitle(f"pilot: {record['split']} split, not the reported run", fontsize=10)
    return figure


def main() -> None:
    """Write the pictures of the result files that there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, help="default: those in benchmarks/results")
    parser.add_argument("--out", type=Path, help="with --result: the picture")
    options = parser.parse_args()
    results = ROOT / "benchmarks" / "results"
    pairs = [(results / f"{name}.json", ROOT / "docs" / "images" / f"{name}.png") for name in NAMES]
    if options.result:
        pairs = [(options.result, options.out or pairs[0][1])]
    for source, target in pairs:
        if source.exists():
            draw(json.loads(source.read_text(encoding="utf-8"))).savefig(target, dpi=110)
            print(f"wrote {target}")


if __name__ == "__main__":
    main()
