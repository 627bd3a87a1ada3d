"""Draw docs/images/vllm.png from benchmarks/results/vllm_cpu.json: `python tools/docs/figures/serving.py`."""

from __future__ import annotations

import json
from pathlib import Path

from lines import COLOURS, DPI, figure, level, message, names

ROOT = Path(__file__).parents[3]
TARGET = ROOT / "docs" / "images" / "vllm.png"


def main() -> None:
    """Requests per processor second against the tokens that stay, a line per concurrency."""
    record = json.loads((ROOT / "benchmarks" / "results" / "vllm_cpu.json").read_text(encoding="utf-8"))
    total = record["vision_tokens"]
    made, axes = figure()
    ends, colours = {}, {}
    for colour, concurrency in zip(COLOURS, sorted({row["concurrency"] for row in record["rows"]}), strict=False):
        ours = [row for row in record["rows"] if row["concurrency"] == concurrency and row["keep"] is not None]
        points = sorted((total if row["keep"] == 1.0 else row["keep"], row["processor"]["median"]) for row in ours)
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, lw=2, color=colour)
        name = f"{concurrency} at a time"
        ends[name], colours[name] = points[0], colour
    level(axes, 1, "vLLM's own class")
    axes.set_xlim(-100, total * 1.05)
    axes.set_xticks([64, 128, 192, total])
    axes.set_xlabel(f"vision tokens that stay, of {total}")
    axes.set_ylabel("requests per processor second,\ntimes those of vLLM's own class")
    most = max(y for _, y in ends.values())
    message(axes, f"More requests at a time gain more: up to {most:.1f} times as many", _under(record))
    made.draw_without_rendering()
    names(axes, ends, colours, side="left")
    made.savefig(TARGET, dpi=DPI)


def _under(record: dict[str, object]) -> str:
    return f"{record['model']} model, {record['method']}, vLLM {record['vllm']}, {record['hardware']}"


if __name__ == "__main__":
    main()
