"""Draw docs/images/quality_pages.png from benchmarks/results/quality_pages.json.

`python tools/docs/figures/quality_pages.py` draws accuracy of the second bundled model against average retained tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lines import COLOURS, DPI, LIGHT, figure, level, message, names

ROOT = Path(__file__).parents[3]
RESULT = ROOT / "benchmarks" / "results" / "quality_pages.json"
TARGET = ROOT / "docs" / "images" / "quality_pages.png"
SHOWN = ("mustdrop+", "mustdrop", "vcast", "downsample", "random")
QUARTER = 0.25  # the budget of the message
PALETTE = dict(zip(SHOWN, COLOURS, strict=True))


def draw(record: Mapping[str, Any]) -> Figure:
    """A line per method with a budget: five in colour, the others grey; a level for the unpruned model."""
    made, axes = figure()
    answered = [row for row in record["rows"] if "cannot" not in row]
    listed = list(dict.fromkeys(row["method"] for row in answered if row["keep"] is not None))
    ends = {}
    for name in [*(name for name in listed if name not in SHOWN), *(name for name in SHOWN if name in listed)]:
        own = sorted((row for row in answered if row["method"] == name), key=lambda row: row["equal_share"])
        own = [row for row in own if row["equal_share"] <= row["keep"] * 1.02]  # others limit the cache alone
        if not own:
            continue
        x, means = [row["equal_share"] for row in own], [row["correct"]["mean"] for row in own]
        if name not in SHOWN:
            axes.plot(x, means, color=LIGHT, lw=1, zorder=1)
            continue
        axes.plot(x, means, marker="o", ms=4, color=PALETTE[name], lw=2, zorder=3)
        low, high = [row["correct"]["low"] for row in own], [row["correct"]["high"] for row in own]
        axes.fill_between(x, low, high, color=PALETTE[name], alpha=0.12, lw=0)
        ends[name] = x[0], means[0]
    whole = next(row for row in answered if row["method"] == "none")
    level(axes, whole["correct"]["mean"], "all tokens")
    ticks = sorted({row["keep"] for row in answered if row["keep"]})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(ticks) * 0.42, max(ticks) * 1.08)
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("average retained tokens per layer, share of the vision tokens")
    axes.set_ylabel("right answers")
    right = {row["method"]: row["correct"]["mean"] for row in answered if row["keep"] == QUARTER}
    under = f"bundled Qwen3-VL, {whole['questions']} questions; bands: 95 % intervals; grey: other methods"
    found = " and ".join(f"{right[name]:.0%} with {name}" for name in ("mustdrop+", "random") if name in right)
    text = f"A quarter of the tokens: right in {found}"
    message(axes, text if record["split"] == "heldout" else f"pilot: {record['split']} samples", under)
    made.draw_without_rendering()
    names(axes, ends, PALETTE, side="left")
    return made


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    draw(json.loads(options.result.read_text(encoding="utf-8"))).savefig(options.out, dpi=DPI)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
