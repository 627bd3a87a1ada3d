"""Draw docs/images/vllm.png from benchmarks/results/vllm_cpu.json: `python tools/docs/figures/serving.py`."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[3]
TARGET = ROOT / "docs" / "images" / "vllm.png"


def main() -> None:
    """Requests per processor second against the tokens that stay, a line per concurrency; the cross is vLLM's class."""
    record = json.loads((ROOT / "benchmarks" / "results" / "vllm_cpu.json").read_text(encoding="utf-8"))
    total = record["vision_tokens"]
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, concurrency in enumerate(sorted({row["concurrency"] for row in record["rows"]})):
        rows = [row for row in record["rows"] if row["concurrency"] == concurrency]
        ours = [row for row in rows if row["keep"] is not None]
        tokens = [total if row["keep"] == 1.0 else row["keep"] for row in ours]
        ratios = [row["processor"]["median"] for row in ours]
        axes.plot(tokens, ratios, marker="o", color=f"C{i}", label=f"{concurrency} at a time")
        axes.plot([total], [1.0], marker="x", color="black", linestyle="none")
    axes.set_xticks([64, 128, 192, total])
    axes.set_xlabel("vision tokens that stay")
    axes.set_ylabel("requests per processor second,\nvLLM's own class is 1")
    axes.set_title(record["hardware"], fontsize=9)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(TARGET, dpi=130)


if __name__ == "__main__":
    main()
