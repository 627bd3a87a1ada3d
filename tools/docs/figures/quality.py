"""Draw docs/images/quality*.png from benchmarks/results/quality.json: `python tools/docs/figures/quality.py`.

Methods that were measured again, on the same questions, are drawn as of the newer run (quality_fixed.json). Two
figures: accuracy against what was processed, and against what was computed. A few methods are in colour, the others are
grey; the table beside the figure has them all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lines import COLOURS, DPI, LIGHT, figure, level, message, names

ROOT = Path(__file__).parents[3]
TARGET = ROOT / "docs" / "images" / "quality.png"
SHOWN = ("mustdrop+", "mustdrop", "vscan", "fastv", "random")
PALETTE = dict(zip(SHOWN, COLOURS, strict=True))
SMALL, TOTAL = 64, 576  # the budget of the message


def curves(axes: Axes, record: Mapping[str, Any], cost: str) -> dict[str, list[tuple[float, float]]]:
    """A line per method with a budget, and a level for the unpruned model; the points of the lines in colour."""
    answered = [row for row in record["rows"] if "cannot" not in row]
    listed = list(dict.fromkeys(row["method"] for row in answered if row["keep"] is not None))
    shown = {}
    for name in [*(name for name in listed if name not in SHOWN), *(name for name in SHOWN if name in listed)]:
        own = sorted((row for row in answered if row["method"] == name), key=lambda row: row[cost])
        x, score = [row[cost] for row in own], [row["correct"] for row in own]
        means = [s["mean"] for s in score]
        if name not in SHOWN:
            axes.plot(x, means, color=LIGHT, lw=1, zorder=1)
            continue
        axes.plot(x, means, marker="o", ms=4, color=PALETTE[name], lw=2, zorder=3)
        low, high = [s["low"] for s in score], [s["high"] for s in score]
        axes.fill_between(x, low, high, color=PALETTE[name], alpha=0.12, lw=0)
        shown[name] = list(zip(x, means, strict=True))
    (whole,) = [row["correct"]["mean"] for row in answered if row["keep"] is None]
    level(axes, whole, "all tokens")
    axes.set_xscale("log")
    axes.set_ylim(0.15, 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("right answers")
    return shown


def draw(record: Mapping[str, Any], cost: str = "equal_tokens") -> Figure:
    """One figure.

    Args:
        record: of the result file.
        cost: "equal_tokens" or "flops".
    """
    made, axes = figure()
    shown = curves(axes, record, cost)
    questions = len(record["seeds"]) * record["scenes_per_seed"] * len(record["types"])
    under = f"bundled model, {questions} questions about digits; bands: 95 % intervals; grey: the other methods"
    if cost == "equal_tokens":
        budgets = sorted({round(row["equal_tokens"]) for row in record["rows"] if row["keep"] and "cannot" not in row})
        budgets = [number for number in budgets if number < TOTAL]
        axes.set_xticks(budgets, [str(number) for number in budgets])
        axes.set_xlim(min(budgets) * 0.93, max(budgets) * 1.9)
        axes.set_xlabel(f"average retained tokens per layer, of {TOTAL}")
        text = _at_small(record)
    else:
        axes.set_xticks(ticks := [0.15, 0.2, 0.3, 0.5, 0.7], [f"{tick:.0%}" for tick in ticks])
        axes.set_xlim(0.14, 1.0)
        axes.set_xlabel("FLOPs of the prompt, share of the unpruned model's")
        text = _cheapest(shown)
    axes.minorticks_off()
    message(axes, text if record["split"] == "heldout" else f"pilot: {record['split']} scenes", under)
    made.draw_without_rendering()
    names(axes, {name: points[-1] for name, points in shown.items()}, PALETTE)
    return made


def _at_small(record: Mapping[str, Any]) -> str:
    right = {row["method"]: row["correct"]["mean"] for row in _near(record["rows"], SMALL / TOTAL)}
    found = [f"{right[name]:.0%} with {name}" for name in ("mustdrop+", "random") if name in right]
    return f"{SMALL} of {TOTAL} tokens: right in {' and '.join(found)}" if found else "Accuracy and budget"


def _near(rows: Sequence[Mapping[str, Any]], share: float) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["keep"] and "cannot" not in row and abs(row["keep"] - share) < 0.01]


def _cheapest(shown: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Who gives 85 % of the right answers with the fewest FLOPs, among the lines in colour."""
    reached = {name: min((x for x, y in points if y >= 0.85), default=2.0) for name, points in shown.items()}
    best = min(reached, key=lambda name: reached[name])
    return (
        f"85% right takes {reached[best]:.0%} of the FLOPs with {best}" if reached[best] <= 1 else "Accuracy and FLOPs"
    )


def merged(record: Mapping[str, Any], newer: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the rows of the methods that a newer run measured again, on the same questions."""
    same = ("seeds", "types", "scenes_per_seed", "split")
    if any(record[name] != newer[name] for name in same):
        raise SystemExit(f"the newer run has other questions: {[name for name in same if record[name] != newer[name]]}")
    again = {row["method"] for row in newer["rows"]}
    return {**record, "rows": [row for row in record["rows"] if row["method"] not in again] + newer["rows"]}


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    newer = ROOT / "benchmarks" / "results" / "quality_fixed.json"
    parser.add_argument("--newer", type=Path, default=newer, help="a run of some methods on the same questions")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    read = [json.loads(path.read_text(encoding="utf-8")) for path in (options.result, options.newer)]
    record = merged(*read)
    for cost, path in (("equal_tokens", options.out), ("flops", options.out.with_stem(f"{options.out.stem}-flops"))):
        draw(record, cost).savefig(path, dpi=DPI)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
