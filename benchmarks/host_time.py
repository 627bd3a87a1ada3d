"""What the host pays for a first token: processor time with tiny widths, patched beside untouched, alternating.

A GPU's host queues one launch per operation, and with one prompt it is the host that is waited for. With tiny widths
and few patches nearly all of the processor's time is the host's part: Python, hooks, dispatch. The model has the layers
of LLaVA-1.5-7B (`benchmarks.launches`). Processor time of one thread, not wall clock, so that neighbours on the machine
count little; pairs of one untouched and one patched call in turn, the median of their ratios.

On a CPU the host does the kernels' mathematics as well, which on a GPU is one launch each. How long that takes is
clocked in calls apart, and a second ratio leaves it out.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

import mustdrop
from benchmarks import launches
from benchmarks.common import RESULTS, save
from mustdrop.kernels.operation import OPERATIONS
from mustdrop.provenance import provenance

SIDE, KEEP = 8, 21  # patches per side, tokens kept: a third
METHODS = ("none", "mustdrop", "mustdrop+", "divprune", "fastv")


def first_token(model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> float:
    """Processor seconds of this thread for one `generate` of one token."""
    start = time.thread_time()
    model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    return time.thread_time() - start


@contextmanager
def clocked_kernels() -> Iterator[list[float]]:
    """While the context lasts, a list gets the processor seconds of each kernel's mathematics on the host."""
    spent, before, depth = list[float](), [], [0]

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if not depth[0]:  # a reference may call another
                    spent.append(time.thread_time() - start)

        return run

    for known in OPERATIONS.values():
        before.append((known, known.reference, known.on_host))
        known.reference = clocked(known.reference)
        known.on_host = None if known.on_host is None else clocked(known.on_host)
    try:
        yield spent
    finally:
        for known, reference, on_host in before:
            known.reference, known.on_host = reference, on_host


def kernel_time(model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], calls: int = 10) -> float:
    """Processor seconds that the kernels' mathematics takes of one first token, the median of some."""
    found = []
    with clocked_kernels() as spent:
        for _ in range(calls):
            spent.clear()
            first_token(model, inputs)
            found.append(sum(spent))
    return statistics.median(found)


@torch.inference_mode()
def measure(
    methods: tuple[str, ...], batch: int, pairs: int, keep: int = KEEP, side: int = SIDE
) -> list[dict[str, Any]]:
    """One row per method: the ratio of patched to untouched, its quartiles, and both times."""
    torch.set_num_threads(1)
    plain, model = launches.build(side=side), launches.build(side=side)
    inputs = {name: value.clone() for name, value in launches.prompt(batch, side).items()}
    rows = []
    for method in methods:
        settings = {} if method == "none" else {"keep": keep}
        with mustdrop.patched(model, method, **settings):
            for _ in range(3):
                first_token(plain, inputs), first_token(model, inputs)
            kernels = kernel_time(model, inputs)
            times = []
            for k in range(pairs):  # who comes first takes turns
                own = [first_token(m, inputs) for m in ((plain, model) if k % 2 else (model, plain))]
                times.append(tuple(own) if k % 2 else tuple(reversed(own)))
        ratios = [patched / untouched for untouched, patched in times]
        without = [(patched - kernels) / untouched for untouched, patched in times]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append({
            "method": method, "batch": batch, "ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)],
            "untouched_ms": round(1e3 * statistics.median(t for t, _ in times), 2),
            "patched_ms": round(1e3 * statistics.median(t for _, t in times), 2),
            "kernels_ms": round(1e3 * kernels, 2), "ratio_without_kernels": round(statistics.median(without), 3),
        })  # fmt: skip
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks host_time`."""
    parser.add_argument("--method", action="append", help=f"default: {', '.join(METHODS)}")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 8")
    parser.add_argument("--pairs", type=int, default=40, help="of calls (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/host_time.json)")


def run(options: argparse.Namespace) -> int:
    """Measure, print, save."""
    warnings.simplefilter("ignore", mustdrop.errors.NothingDroppedWarning)
    rows = []
    for batch in options.batch or (1, 8):
        for row in measure(tuple(options.method or METHODS), batch, options.pairs):
            print(row)
            rows.append(row)
    whole = not (options.method or options.batch)
    out = options.out or (RESULTS / "host_time.json" if whole else None)
    if out is not None:
        what = "processor time of one thread for a first token with tiny widths: patched over untouched, in pairs"
        size = {"layers": launches.LAYERS, "blocks": launches.BLOCKS, "vision": SIDE**2, "keep": KEEP}
        save(out, {"what": what, **provenance(seed=0), **size, "pairs": options.pairs, "rows": rows})
    return 0
