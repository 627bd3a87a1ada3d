"""Draw docs/images/speed.png and kernel-growth.png from benchmarks/results: `python tools/docs/figures/speed.py`.

The first is about models: how much faster the first token comes, against what the FLOPs promise. The second is about
one kernel: what scoring costs as vision tokens grow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lines import COLOURS, DPI, GREY, LIGHT, figure, level, message, names

ROOT = Path(__file__).parents[3]
IMAGES = ROOT / "docs" / "images"


def prefill(record: Mapping[str, Any]) -> Figure:
    """The measured speed-up of the time to the first token and of the prefill, by batch; sdpa in colour, eager grey."""
    made, axes = figure()
    ends, colours = {}, {}
    (model,) = [model for model in record["models"] if model["rows"]]
    for place, batch in enumerate((8, 1)):
        for attention in ("eager", "sdpa"):
            rows = [row for row in model["rows"] if (row["attention"], row["batch"]) == (attention, batch)]
            points = sorted((row["prefill"]["flops_ratio"], row["first_token"]["speed_up"]["median"]) for row in rows)
            colour = COLOURS[place] if attention == "sdpa" else LIGHT
            axes.plot(
                *zip(*points, strict=True), marker="o", ms=4, lw=2, color=colour, zorder=2 + (attention == "sdpa")
            )
            name = "eight prompts" if batch > 1 else "one prompt"
            if attention == "sdpa":
                ends[name], colours[name] = points[-1], colour
            else:
                ends[f"{name}, eager"], colours[f"{name}, eager"] = points[-1], GREY
    top = max(row["prefill"]["flops_ratio"] for row in model["rows"])
    level(axes, 1, "as fast as unpruned", side="right")
    axes.set_xlim(0.9, top * 1.36)
    axes.set_ylim(0, None)
    axes.set_xlabel("FLOPs of the unpruned prefill over those of the pruned one")
    axes.set_ylabel("first token: times as fast")
    best = {
        batch: max(r["first_token"]["speed_up"]["median"] for r in model["rows"] if _is(r, batch)) for batch in (8, 1)
    }
    worst = min(r["first_token"]["speed_up"]["median"] for r in model["rows"] if _is(r, 1))
    message(
        axes,
        f"Eight prompts at a time: up to {best[8]:.1f} times as fast. One prompt: {worst:.2f} at worst",
        f"{model['model']} sizes, {model['dtype']}, {model['vision_tokens']} + {model['text_tokens']} tokens, "
        f"{record['hardware']}; sdpa in colour",
    )
    made.draw_without_rendering()
    names(axes, ends, colours)
    return made


def _is(row: Mapping[str, Any], batch: int) -> bool:
    return row["batch"] == batch and row["attention"] == "sdpa" and row["share"] < 1


def growth(record: Mapping[str, Any]) -> Figure:
    """Time of scoring, kernel and reference, against vision tokens; the dotted line is in proportion to them."""
    made, axes = figure()
    points = record["growth"]
    tokens = [point["vision_tokens"] for point in points]
    colours = {"kernel": COLOURS[0], "reference": GREY, "in proportion": "black"}
    ends = {}
    for name, label in (("eager", "reference"), ("kernel", "kernel")):
        times = [1e6 * point[name]["median"] for point in points]
        axes.plot(tokens, times, marker="o", ms=4, lw=2, color=colours[label])
        ends[label] = (tokens[-1], times[-1])
    last = 1e6 * points[-1]["kernel"]["median"]
    axes.plot(tokens, [last * n / tokens[-1] for n in tokens], color="black", linestyle=":", lw=1)
    axes.annotate(
        "in proportion", (tokens[1], last * tokens[1] / tokens[-1]), (6, -4), textcoords="offset points", fontsize=9,
        va="top",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{n:,}" for n in tokens], rotation=30)
    axes.minorticks_off()
    axes.set_xlim(tokens[0] * 0.85, tokens[-1] * 2.6)
    axes.set_xlabel("vision tokens (64 text tokens)")
    axes.set_ylabel("microseconds")
    first, most = points[0], points[-1]
    ratio = (most["kernel"]["median"] / first["kernel"]["median"], tokens[-1] / tokens[0])
    message(
        axes,
        f"Scoring {ratio[1]:.0f} times the tokens takes the kernel {ratio[0]:.0f} times as long",
        f"the kernel alone, {record['dtype']}, {record['hardware']}",
    )
    made.draw_without_rendering()
    names(axes, ends, colours)
    return made


def main() -> None:
    """Read the result files, draw, save."""
    results = ROOT / "benchmarks" / "results"
    kernels, serving = (json.loads((results / f"{name}_cuda.json").read_text()) for name in ("kernels", "serving"))
    prefill(serving).savefig(IMAGES / "speed.png", dpi=DPI)
    growth(kernels).savefig(IMAGES / "kernel-growth.png", dpi=DPI)


if __name__ == "__main__":
    main()
