"""The prompt's pass through the language model, as it is and replayed by `mustdrop.compile`, patched and unpatched.

Rows are model x batch x budget. Each has four runs that stand next to each other: the untouched model, the same
captured (patched with the method `none`, which drops nothing, so that the same machinery captures it), the patched
model, and that captured. Every number is a ratio of neighbours.

Without a GPU there are no CUDA graphs: `torch.compile` with a backend that changes nothing takes their place, at tiny
sizes. That shows that the command runs, and nothing about speed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mustdrop
from benchmarks.common import RESULTS, Clock, measure, origin, ratios, save, spread
from benchmarks.models import Subject, subject

SHARES = (1 / 3, 1 / 9, 1 / 18)
METHODS = ("mustdrop", "mustdrop+", "divprune")
RUNS = ("untouched", "untouched captured", "patched", "captured")
_SETTLED = 3  # calls before a shape is measured: the second one captures it


def once(made: Subject, inputs: dict[str, Tensor], run: str, method: str, keep: int, clock: Clock) -> dict[str, float]:
    """Seconds of a first token and of the language model in it, once the shape has its graph."""
    patched = run in ("patched", "captured")
    if run == "untouched":
        return _settled(made, inputs, clock)
    name, settings = (method, {"keep": keep}) if patched else ("none", {})
    with mustdrop.patched(made.model, name, **settings):
        if run.endswith("captured"):
            cuda = clock.device.type == "cuda"
            mustdrop.compile(made.model, graphs=1, after=1, **({} if cuda else {"backend": "eager"}))
        return _settled(made, inputs, clock)


def _settled(made: Subject, inputs: dict[str, Tensor], clock: Clock) -> dict[str, float]:
    for _ in range(_SETTLED):
        measure(made.model, inputs, clock, 1)
    seen = measure(made.model, inputs, clock, 1)
    return {"first_token": seen["prompt"], "prefill": seen["text"]}


def row(
    made: Subject, inputs: dict[str, Tensor], method: str, keep: int, clock: Clock, pairs: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each run, by pairs whose order alternates."""
    seen: dict[str, dict[str, list[float]]] = {run: {} for run in RUNS}
    for number in range(pairs):
        for run in RUNS[::-1] if number % 2 else RUNS:
            for name, seconds in once(made, inputs, run, method, keep, clock).items():
                seen[run].setdefault(name, []).append(seconds)
    return seen


def summary(batch: int, method: str, keep: int, seen: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """A row of the result file."""
    out: dict[str, Any] = {"batch": batch, "method": method, "keep": keep}
    for name in ("prefill", "first_token"):
        plain = seen["untouched"][name]
        out[name] = {
            "seconds": {run: spread(seen[run][name]) for run in RUNS},
            "speed_up": {run: ratios(plain, seen[run][name]) for run in RUNS[1:]},
            "captured_of_captured": ratios(seen["untouched captured"][name], seen["captured"][name]),
        }
    return out


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """The result file."""
    device, began = torch.device(options.device), time.perf_counter()
    torch.set_grad_enabled(False)
    clock, rows, left_out = Clock(device), [], []
    for name in options.model:
        made = subject(name, device, "sdpa", options.seed)
        for batch in options.batch:
            inputs = made.prompt(options.seed, batch)
            for method in options.method:
                for share in SHARES:
                    keep = round(made.vision * share)
                    if options.seconds and time.perf_counter() - began > options.seconds:
                        left_out.append(f"{name}, batch {batch}, {method}, keep {keep}: the time was up")
                        continue
                    seen = row(made, inputs, method, keep, clock, options.pairs)
                    rows.append({"model": name, **summary(batch, method, keep, seen)})
                    print(name, batch, method, keep, rows[-1]["prefill"]["speed_up"], flush=True)
    return {
        "what": "the prompt's pass through the language model, as it is and captured",
        "valid": device.type == "cuda" and not options.quick,
        "note": "" if device.type == "cuda" else "No GPU: nothing was captured, and no number here is about speed.",
        **origin(device, options.seed),
        "rows": rows,
        "left_out": left_out,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks captured`."""
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--model", action="append", help="default: LLaVA-1.5-7B on a GPU, tiny on a CPU")
    parser.add_argument("--method", action="append", help=f"default: {', '.join(METHODS)}")
    parser.add_argument("--batch", type=int, action="append", help="prompts at a time (default: 1 and 8; 1 on a CPU)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one method: does it run?")
    parser.add_argument("--pairs", type=int, help="runs of each kind per row (default 4)")
    parser.add_argument("--seconds", type=float, help="begin no further row after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results, and none for --quick)")


def run(options: argparse.Namespace) -> int:
    """Measure, print, save."""
    cuda = options.device.startswith("cuda")
    small = options.quick or not cuda
    options.model = options.model or (["tiny"] if small else ["llava-1.5-7b"])
    options.method = options.method or (METHODS[:1] if small else METHODS)
    options.batch = options.batch or ([1, 8] if cuda else [1])
    options.pairs = options.pairs or (1 if options.quick else 4)
    result = benchmark(options)
    out = options.out or (None if small else RESULTS / "captured_cuda.json")
    if out is not None:
        save(out, result)
    return 0
