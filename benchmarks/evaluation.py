"""The bundled model on its own benchmark at several budgets: scores, tokens, and where the time went.

    python -m benchmarks evaluation

Runs `mustdrop eval scenes` for each row and writes `benchmarks/results/evaluation.json`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, origin, save
from mustdrop.eval.result import EvalResult
from mustdrop.eval.run import evaluate
from mustdrop.eval.settings import Settings

ROWS: tuple[tuple[str, int | None], ...] = (("none", None), ("mustdrop", 192), ("mustdrop", 128), ("mustdrop", 64))
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--questions", type=int, default=400, help="eight to each scene")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1, help="processes that load")
    parser.add_argument("--out", type=Path, default=RESULTS / "evaluation.json")


def run(options: argparse.Namespace) -> int:
    """Evaluate every row."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for method, keep in ROWS:
            settings = Settings(
                "scenes",
                method=method,
                knobs={} if keep is None else {"keep": keep},
                limit=options.questions,
                seed=SEED,
                batch_size=options.batch_size,
                workers=options.workers,
                out=Path(folder) / f"{method}-{keep}",
            )
            result = evaluate(settings)
            if result is None or result.failed:
                return 1
            rows.append(row(result))
            print(rows[-1], flush=True)
    what = "the bundled model on its own benchmark"
    save(options.out, {"what": what, **origin(torch.device("cpu"), SEED), "questions": options.questions, "rows": rows})
    return 0


def row(result: EvalResult) -> dict[str, Any]:
    """What the documents show of a result."""
    assert result.tokens is not None
    assert result.cost is not None
    assert result.latency is not None
    return {
        "method": result.method,
        "keep": result.keep,
        "scores": result.scores,
        "tokens": result.tokens.model_dump(),
        "flops_ratio": round(result.cost.flops_ratio, 4),
        "kv_ratio": round(result.cost.kv_ratio, 4),
        "latency": result.latency.model_dump(),
        "time": result.time.model_dump(),
        "peak_memory_bytes": result.peak_memory_bytes,
    }
