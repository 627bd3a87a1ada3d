"""A patched LLaVA against the same model unpatched: prefill, whole prompt, decoding, KV bytes.

The model has random weights: speed depends on sizes, not on what was learned. Every number is a ratio of two runs
that stood next to each other, and the order of the two alternates. Two scopes, each with its own FLOPs ratio:

- `text`: the language model's forward over the prompt, scoring and gathering included (clock hooks on the module);
- `prompt`: `generate` with one new token, vision tower and everything around it included.

`bare` tells what the hardware gives: the model's own decoder layers, called directly on as many tokens as the patched
run left to each. Fewer tokens make matrix products less efficient; that part of the loss is not mustdrop's.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import mustdrop
from benchmarks.aims import MOST_OVERHEAD, SHARE_OF_FLOPS
from benchmarks.common import (
    AFTER,
    BEFORE,
    RESULTS,
    SIZES,
    VISION,
    Clock,
    build,
    measure,
    origin,
    prompt,
    ratios,
    save,
    significant,
    spread,
)
from benchmarks.hardware import bare, roofline
from benchmarks.packed import pack
from mustdrop.cost import linear_flops
from mustdrop.errors import NothingDroppedWarning

BUDGETS = (192, 128, 64)
BATCH = 4  # prompts at a time in the rows that show what the length of matrix products does


@dataclass
class Row:
    """One method at one budget, and what was measured; the lists run over the rounds, in seconds."""

    method: str
    keep: int | None
    batch: int = 1
    unpatched: dict[str, list[float]] = field(default_factory=lambda: {"text": [], "prompt": [], "decode": []})
    patched: dict[str, list[float]] = field(default_factory=lambda: {"text": [], "prompt": [], "decode": []})
    bare: list[float] = field(default_factory=list)
    trace: Any = None
    stored: int = 0

    @property
    def drops(self) -> bool:
        """Whether fewer tokens are asked for."""
        return self.keep in BUDGETS


def one_round(model: Any, inputs: dict[str, Tensor], row: Row, clock: Clock, new: int, swap: bool) -> None:
    """Unpatched and patched next to each other, then the bare layers."""
    scopes = ("text", "prompt") if new == 1 else ("decode",)

    def unpatched() -> None:
        seen = measure(model, inputs, clock, new)
        for scope in scopes:
            row.unpatched[scope].append(seen[scope])

    def patched() -> None:
        budget = {} if row.keep is None else {"keep": row.keep}
        with mustdrop.patched(model, row.method, **budget):
            seen = measure(model, inputs, clock, new)
            if new == 1:
                row.trace, row.stored = mustdrop.trace(model), seen["stored"]
        for scope in scopes:
            row.patched[scope].append(seen[scope])

    for run in (patched, unpatched) if swap else (unpatched, patched):
        run()
    if new == 1 and row.drops:
        row.bare.append(bare(model, lengths_of(row), clock, row.batch))


def lengths_of(row: Row) -> list[int]:
    """Tokens, vision and text, that each decoder layer processed."""
    return [int(n) + BEFORE + AFTER for n in row.trace.tokens[:, 0]]


def summary(model: LlavaForConditionalGeneration, row: Row) -> dict[str, Any]:
    """A row of the result file."""
    trace, parts, config = row.trace, row.trace.flops.parts, model.config.text_config
    head = row.batch * linear_flops(model.get_output_embeddings())  # outside the language model's forward
    text_flops = (parts["prefill"].unpruned - head) / (parts["prefill"].actual - head + parts["scoring"].actual)
    out: dict[str, Any] = {
        "method": row.method,
        "keep": row.keep,
        "batch": row.batch,
        "equal_tokens": significant(float(trace.equal_tokens[0])),
        "tokens": trace.tokens[:, 0].tolist(),
    }
    for scope, flops in (("text", text_flops), ("prompt", 1 / trace.flops.ratio)):
        speed_up = ratios(row.unpatched[scope], row.patched[scope])
        out[scope] = {
            "flops_ratio": significant(flops),
            "speed_up": speed_up,
            "share_of_flops_ratio": significant(speed_up["median"] / flops),
            "seconds_unpatched": spread(row.unpatched[scope]),
            "seconds_patched": spread(row.patched[scope]),
        }
    if row.bare:
        out["bare"] = {
            "speed_up": ratios(row.unpatched["text"], row.bare),
            "seconds": spread(row.bare),
            "pruning_share": spread([1 - b / p for b, p in zip(row.bare, row.patched["text"], strict=True)]),
        }
    if row.patched["decode"]:
        out["decode"] = {
            "speed_up": ratios(row.unpatched["decode"], row.patched["decode"]),
            "tokens_per_second_unpatched": spread([1 / s for s in row.unpatched["decode"]]),
            "tokens_per_second_patched": spread([1 / s for s in row.patched["decode"]]),
        }
    slot = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    out["kv_bytes"] = {
        "unpruned": trace.kv_bytes.unpruned,
        "reported": trace.kv_bytes.actual,
        "stored": row.stored,
        "of_kept_tokens": slot * int(trace.kv_lengths.sum()),
    }
    return out


def promises(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was promised, and whether this run meets it."""
    pruned = [row for row in rows if row["method"] == "mustdrop" and row["keep"] in BUDGETS]
    (whole,) = [row for row in rows if row["method"] == "mustdrop" and row["keep"] not in BUDGETS]
    one = [row for row in pruned if row["batch"] == 1]
    least = min(row["text"]["share_of_flops_ratio"] for row in one)
    most = min(row["text"]["share_of_flops_ratio"] for row in pruned if row["batch"] > 1)
    overhead = significant(1 / whole["text"]["speed_up"]["median"] - 1, 3)
    exact = all(
        row["kv_bytes"]["reported"] == row["kv_bytes"]["stored"] == row["kv_bytes"]["of_kept_tokens"]
        for row in rows
        if row["batch"] == 1  # rows of a batch that keep different numbers are padded to the longest
    )
    return {
        "least_share_of_flops_ratio": {"promised": SHARE_OF_FLOPS, "measured": least, "met": least >= SHARE_OF_FLOPS},
        f"least_share_of_flops_ratio_batch_{BATCH}": {
            "promised": SHARE_OF_FLOPS,
            "measured": most,
            "met": most >= SHARE_OF_FLOPS,
        },
        "keep_all_overhead": {
            "promised": MOST_OVERHEAD,
            "measured": overhead,
            "met": overhead <= MOST_OVERHEAD,
        },
        "kv_bytes_exact": {"promised": True, "measured": exact, "met": exact},
    }


@torch.inference_mode()
def benchmark(options: argparse.Namespace, step: Callable[[str], None]) -> dict[str, Any]:
    """Build, warm up, measure."""
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    clock = Clock(device)
    came_from = origin(device, options.seed)
    step("building")
    model = build(options.size, device, options.seed)
    if options.weights == "packed":
        pack(model)
    inputs = prompt(model, options.seed)
    several = prompt(model, options.seed, BATCH)
    rows = [Row("none", None), Row("mustdrop", VISION), *(Row(m, k) for m in ("mustdrop", "random") for k in BUDGETS)]
    decoded = [row for row in rows if row.method != "random"]
    rows += [Row("mustdrop", k, BATCH) for k in BUDGETS]
    plan = [(row, 1, p) for p in range(options.pairs) for row in rows if row.batch == 1 or p % 2 == 0]
    # a promise of two per cent needs more pairs than one of a factor: the rows that drop nothing run more often
    plan += [(row, 1, p) for p in range(options.pairs, options.whole_pairs) for row in rows if not row.drops]
    plan += [(row, options.steps + 1, p) for p in range(options.decode_pairs) for row in decoded]
    measure(model, inputs, clock, 2)
    for row in rows[:3]:  # warm up, and forget
        one_round(model, inputs, Row(row.method, row.keep), clock, 2, swap=True)
    for row, new, p in plan:
        step(f"{'prefill' if new == 1 else 'decode'} {row.method} {row.keep or ''} {p + 1}")
        one_round(model, inputs if row.batch == 1 else several, row, clock, new, swap=p % (2 * row.batch) >= row.batch)
    step("roofline")
    seen = {n for row in rows for n in lengths_of(row)}
    table = [summary(model, row) for row in rows]
    return {
        "what": "speed, FLOPs and KV bytes of a patched LLaVA with random weights against the unpatched model",
        **came_from,
        "model": {
            "size": options.size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "text": SIZES[options.size][0],
            "vision": SIZES[options.size][1],
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "weights": options.weights,
        },
        "prompt": {"vision_tokens": VISION, "text_tokens": BEFORE + AFTER, "decode_steps": options.steps},
        "pairs": {"prefill": options.pairs, "keep_all": options.whole_pairs, "decode": options.decode_pairs},
        "rows": table,
        "roofline": roofline(model, sorted(seen, reverse=True), clock, options.decode_pairs),
        "promises": promises(table),
    }


def report(result: dict[str, Any], console: Console) -> None:
    """The result on the terminal."""
    table = Table(
        "method", "keep", "batch", "text: FLOPs", "measured", "share", "bare", "prompt: FLOPs", "measured", "decode"
    )
    for row in result["rows"]:
        text, whole = row["text"], row["prompt"]
        extra = [f"{row[name]['speed_up']['median']:.2f}" if name in row else "" for name in ("bare", "decode")]
        speeds = [
            f"{s['speed_up']['median']:.3f} ({s['speed_up']['min']:.3f}-{s['speed_up']['max']:.3f})"
            for s in (text, whole)
        ]
        cells = (f"{text['flops_ratio']:.2f}", speeds[0], f"{text['share_of_flops_ratio']:.2f}", extra[0])
        table.add_row(
            row["method"],
            str(row["keep"]),
            str(row["batch"]),
            *cells,
            f"{whole['flops_ratio']:.2f}",
            speeds[1],
            extra[1],
        )
    console.print(table)
    points = (f"{point['tokens']}: {point['efficiency']:.2f}" for point in result["roofline"])
    console.print("efficiency of the linear layers by tokens:", ", ".join(points))
    for name, promise in result["promises"].items():
        console.print(
            f"{name}: {promise['measured']} (promised {promise['promised']})", "met" if promise["met"] else "NOT MET"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks end_to_end`."""
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--size", choices=SIZES, help="default: small on a CPU, llava-1.5-7b on a GPU")
    parser.add_argument(
        "--weights",
        choices=("plain", "packed"),
        help="packed: laid out for the processor once, on both sides (benchmarks/packed.py); default on a CPU",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and few pairs: does it run?")
    parser.add_argument("--pairs", type=int, help="pairs of runs per row (default 6)")
    parser.add_argument("--whole-pairs", type=int, help="pairs of runs per row that drops nothing (default 4 * pairs)")
    parser.add_argument("--decode-pairs", type=int, help="pairs of runs per row for decoding (default 3)")
    parser.add_argument("--steps", type=int, default=16, help="decode steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results, and none for --quick)")


def run(options: argparse.Namespace) -> int:
    """Measure, print, save; 1 where a promise is not met (--quick measures no promise)."""
    usual = "llava-1.5-7b" if options.device.startswith("cuda") else "small"
    options.size = options.size or ("tiny" if options.quick else usual)
    options.weights = options.weights or ("packed" if options.device == "cpu" else "plain")
    if options.weights == "packed" and options.device != "cpu":
        raise SystemExit("--weights packed is for --device cpu: a GPU's library does not repack weights at every call.")
    options.pairs = options.pairs or (2 if options.quick else 6)
    options.whole_pairs = max(options.pairs, options.whole_pairs or options.pairs * (1 if options.quick else 4))
    options.decode_pairs = options.decode_pairs or (1 if options.quick else 3)
    console = Console()
    with warnings.catch_warnings(), Progress(console=console, transient=True) as progress:
        warnings.simplefilter("ignore", NothingDroppedWarning)
        task = progress.add_task("", total=2 + options.pairs * 9 + options.whole_pairs * 2 + options.decode_pairs * 5)
        start = time.perf_counter()
        result = benchmark(options, lambda text: progress.update(task, advance=1, description=text))
    result["minutes"] = significant((time.perf_counter() - start) / 60, 2)
    report(result, console)
    default = None if options.quick else RESULTS / f"end_to_end_{options.device.split(':')[0]}.json"
    out = options.out or default
    if out is not None:
        save(out, result)
    return int(not options.quick and not all(promise["met"] for promise in result["promises"].values()))
