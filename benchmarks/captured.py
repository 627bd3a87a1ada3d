"""The prompt's pass through the language model, as it is and replayed by `mustdrop.compile`, patched and unpatched.

Rows are model x batch x method x budget. Each has four runs that stand next to each other: the untouched model, the
same captured (patched with the method `none`, which drops nothing, so that the same machinery captures it), the patched
model, and that captured. Every number is a ratio of neighbours. A method whose pass cannot be captured has no fourth
run, and the row says why.

Decode steps follow, patched beside untouched, over a growing and a static cache; on a GPU transformers compiles the
steps over a static one by itself.

Without a GPU there are no CUDA graphs: `torch.compile` with a backend that changes nothing takes their place, at tiny
sizes. That shows that the command runs, and nothing about speed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mustdrop
from benchmarks.common import RESULTS, Clock, measure, origin, ratios, save, spread
from benchmarks.models import Subject, subject
from mustdrop.errors import CaptureWarning

SHARES = (1 / 9, 1 / 3, 1 / 18)  # what is most asked for comes first
METHODS = ("mustdrop", "mustdrop+", "divprune", "snapkv")
DECODED = ("mustdrop", "snapkv")  # whose decode steps are measured, at 1/9
CACHES = ("growing", "static")
RUNS = ("untouched", "untouched captured", "patched", "captured")
_SETTLED = 3  # calls before a shape is measured: the second one captures it


def once(made: Subject, inputs: dict[str, Tensor], run: str, method: str, keep: int, clock: Clock) -> dict[str, float]:
    """Seconds of a first token and of the language model in it, once the shape has its graph.

    Raises:
        CaptureWarning: the pass is to be captured and cannot be.
    """
    patched = run in ("patched", "captured")
    if run == "untouched":
        return _settled(made, inputs, clock)
    name, settings = (method, {"keep": keep}) if patched else ("none", {})
    with mustdrop.patched(made.model, name, **settings), warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
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
) -> tuple[dict[str, dict[str, list[float]]], str]:
    """Seconds of each run, by pairs whose order alternates; and why there is no captured one, if there is none."""
    seen: dict[str, dict[str, list[float]]] = {run: {} for run in RUNS}
    why = ""
    for number in range(pairs):
        for run in RUNS[::-1] if number % 2 else RUNS:
            if run == "captured" and why:
                continue
            try:
                found = once(made, inputs, run, method, keep, clock)
            except CaptureWarning as warning:
                why = str(warning)
                continue
            for name, seconds in found.items():
                seen[run].setdefault(name, []).append(seconds)
    return {run: times for run, times in seen.items() if times}, why


def summary(batch: int, method: str, keep: int, seen: dict[str, dict[str, list[float]]], why: str) -> dict[str, Any]:
    """A row of the result file."""
    out: dict[str, Any] = {"batch": batch, "method": method, "keep": keep}
    if why:
        out["not_captured"] = why
    for name in ("prefill", "first_token"):
        plain, runs = seen["untouched"][name], [run for run in RUNS if run in seen]
        out[name] = {
            "seconds": {run: spread(seen[run][name]) for run in runs},
            "speed_up": {run: ratios(plain, seen[run][name]) for run in runs[1:]},
        }
        if not why:
            out[name]["captured_of_captured"] = ratios(seen["untouched captured"][name], seen["captured"][name])
    return out


def step(made: Subject, inputs: dict[str, Tensor], cache: str, steps: int, clock: Clock) -> float:
    """Seconds of a decode step: of a call with so many, less one with none, once both have been compiled."""
    options = {"cache_implementation": "static"} if cache == "static" else {}
    times = []
    for new in (1, 1 + steps) * 2:  # the first of each compiles
        start = clock()
        made.model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
        times.append(clock() - start)
    return max(times[3] - times[2], 1e-9) / steps


def decoding(
    made: Subject, inputs: dict[str, Tensor], method: str, keep: int, cache: str, clock: Clock, pairs: int, steps: int
) -> dict[str, Any]:
    """A row of decode steps, patched beside untouched."""
    plain, patched = [], []
    for _ in range(pairs):
        plain.append(step(made, inputs, cache, steps, clock))
        with mustdrop.patched(made.model, method, keep=keep):
            patched.append(step(made, inputs, cache, steps, clock))
    seconds = {"untouched": spread(plain), "patched": spread(patched)}
    return {"method": method, "keep": keep, "cache": cache, "seconds": seconds, "speed_up": ratios(plain, patched)}


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """The result file."""
    device, began = torch.device(options.device), time.perf_counter()
    torch.set_grad_enabled(False)
    clock, rows, steps, left_out = Clock(device), [], [], []

    parts = len(options.model) * len(options.batch)

    def late(what: str) -> bool:
        """Each model and batch has its part of the time, and what those before it have left."""
        part = options.model.index(name) * len(options.batch) + options.batch.index(batch) + 1
        up = bool(options.seconds) and time.perf_counter() - began > options.seconds * part / parts
        if up:
            left_out.append(f"{what}: the time was up")
        return up

    for name in options.model:
        made = subject(name, device, "sdpa", options.seed)
        few = options.quick and name != options.model[0]  # one model is enough to see that everything runs
        for batch in options.batch:
            inputs = made.prompt(options.seed, batch)
            for share in SHARES[:1] if few else SHARES:
                keep = round(made.vision * share)
                for method in options.method[:1] if few else options.method:
                    if late(f"{name}, batch {batch}, {method}, keep {keep}"):
                        continue
                    seen, why = row(made, inputs, method, keep, clock, options.pairs)
                    rows.append({"model": name, **summary(batch, method, keep, seen, why)})
                    print(name, batch, method, keep, rows[-1]["prefill"]["speed_up"], flush=True)
            for cache in () if few else CACHES:
                for method in [method for method in DECODED if method in options.method]:
                    keep = round(made.vision * SHARES[0])
                    if late(f"{name}, batch {batch}, {method}, decode steps over a {cache} cache"):
                        continue
                    some = decoding(made, inputs, method, keep, cache, clock, options.pairs, options.steps)
                    steps.append({"model": name, "batch": batch, **some})
                    print(name, batch, method, cache, steps[-1]["speed_up"], flush=True)
        del made  # the next model needs its memory
    return {
        "what": "the prompt's pass through the language model, as it is and captured",
        "valid": device.type == "cuda" and not options.quick,
        "note": "" if device.type == "cuda" else "No GPU: nothing was captured, and no number here is about speed.",
        **origin(device, options.seed),
        "rows": rows,
        "decode_steps": options.steps,
        "decode": steps,
        "left_out": left_out,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks captured`."""
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument(
        "--model", action="append", help="default: LLaVA-1.5-7B and LLaVA-NeXT-7B on a GPU, tiny on a CPU"
    )
    parser.add_argument("--method", action="append", help=f"default: {', '.join(METHODS)}")
    parser.add_argument("--batch", type=int, action="append", help="prompts at a time (default: 1 and 8; 1 on a CPU)")
    parser.add_argument("--quick", action="store_true", help="tiny models and two methods: does it run?")
    parser.add_argument("--pairs", type=int, help="runs of each kind per row (default 4)")
    parser.add_argument("--steps", type=int, help="decode steps (default 32; 4 for --quick)")
    parser.add_argument("--seconds", type=float, help="begin no further row after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results, and none for --quick)")


def run(options: argparse.Namespace) -> int:
    """Measure, print, save."""
    cuda = options.device.startswith("cuda")
    small = options.quick or not cuda
    options.model = options.model or (["tiny", "llava-next-tiny"] if small else ["llava-1.5-7b", "llava-next-7b"])
    options.method = options.method or (DECODED if small else METHODS)
    options.batch = options.batch or ([1, 8] if cuda else [1])
    options.steps = options.steps or (4 if small else 32)
    options.pairs = options.pairs or (1 if options.quick else 4)
    result = benchmark(options)
    out = options.out or (None if small else RESULTS / "captured_cuda.json")
    if out is not None:
        save(out, result)
    return 0
