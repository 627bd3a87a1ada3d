"""What every method itself takes of the time to the first token, on both bundled models: `mustdrop.method_time`.

One prompt at a time, of the training split. On a CPU it is processor time of one thread, so that neighbours on the
machine count little; on a GPU the clock waits for the device. Each prompt is asked once unclocked, then in pairs of one
call of the patched and one of the unpatched model, whose order alternates. Per prompt the medians over its pairs count,
over the prompts their mean.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.common import RESULTS, Clock, origin, save, significant
from benchmarks.quality.cells import Cell, check, plan
from benchmarks.quality.measure import REFUSALS
from benchmarks.quality.subjects import DEMO, PAGES, Samples, Scenes, Subject
from mustdrop.errors import NothingDroppedWarning
from mustdrop.method_time import timed

SEED, SCENES = 2004, 3  # of the prompts; scenes, each with a question of another type
#: Of docs/quality.md: a half, which every method can do, a third or a quarter, and a ninth.
BUDGETS = {DEMO: (1 / 2, 1 / 3, 1 / 9), PAGES: (1 / 2, 1 / 4, 1 / 9)}

Inputs = dict[str, Tensor]


def prompts(name: str, device: str) -> tuple[Any, list[Inputs]]:
    """A bundled model and its prompts: of scenes questions of several types, of pages a sample of every kind."""
    asked: Subject = Scenes("train", (SEED,), SCENES, 1, device)
    if name == PAGES:
        asked = Samples("train", (SEED,), 1, 1, device)
    batches = list(asked.batches(asked.names()))
    return batches[0].model, [batch.parts[i % len(batch.parts)].inputs([0]) for i, batch in enumerate(batches)]


def first_token(model: Any, inputs: Inputs) -> None:
    """The call that is measured."""
    model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)


def measure(
    plain: Any, model: Any, given: Sequence[Inputs], cell: Cell, pairs: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """One row: milliseconds of the method, of the whole first token, and of the unpatched model's."""
    row: dict[str, Any] = {"method": cell.method, "keep": cell.key[1]}
    try:
        with cell.patched(model, SEED):
            seen = [list(_pairs(plain, model, inputs, pairs, clock)) for inputs in given]
    except REFUSALS as refusal:
        return row | {"cannot": f"{type(refusal).__name__}: {refusal}"}
    medians = [[statistics.median(column) for column in zip(*own, strict=True)] for own in seen]
    method, whole, unpatched = (1000 * statistics.fmean(column) for column in zip(*medians, strict=True))
    return row | {
        "method_ms": significant(method, 4),
        "prefill_ms": significant(whole, 4),
        "unpatched_ms": significant(unpatched, 4),
        "share": significant(method / whole, 3),
        "ratio": significant(whole / unpatched, 3),
    }


def _pairs(
    plain: Any, model: Any, inputs: Inputs, pairs: int, clock: Callable[[], float]
) -> Iterator[tuple[float, float, float]]:
    """Seconds of the method, of the patched and of the unpatched call, pair by pair."""
    first_token(model, inputs)
    for k in range(pairs):
        unpatched = 0.0
        if k % 2:
            unpatched = _seconds(plain, inputs, clock)
        with timed(model, clock) as spent:
            first_token(model, inputs)
        if not k % 2:
            unpatched = _seconds(plain, inputs, clock)
        yield spent.method, spent.whole, unpatched


def _seconds(model: Any, inputs: Inputs, clock: Callable[[], float]) -> float:
    start = clock()
    first_token(model, inputs)
    return clock() - start


@torch.inference_mode()
def rows(name: str, methods: Sequence[str] | None, pairs: int, device: str) -> list[dict[str, Any]]:
    """The rows of one model."""
    model, given = prompts(name, device)
    plain = copy.deepcopy(model)
    clock = time.thread_time if device == "cpu" else Clock(torch.device(device))
    first_token(plain, given[0])
    found = plan(methods, BUDGETS[name])
    told = track(found, description=name, console=Console(stderr=True), transient=True)
    return [{"model": name} | measure(plain, model, given, cell, pairs, clock) for cell in told]


def show(found: Sequence[dict[str, Any]], console: Console) -> None:
    """The rows on the terminal."""
    table = Table("model", "method", "keep", "method ms", "first token ms", "share", "beside unpatched")
    for row in found:
        keep = "all" if row["keep"] is None else f"{row['keep']:.0%}"
        numbers = ["cannot", "", "", ""]
        if "cannot" not in row:
            numbers = [
                f"{row['method_ms']:.1f}",
                f"{row['prefill_ms']:.1f}",
                f"{row['share']:.0%}",
                f"{row['ratio']:.2f}",
            ]
        table.add_row(row["model"], row["method"], keep, *numbers)
    console.print(table)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks method_time`."""
    parser.add_argument("--model", choices=tuple(BUDGETS), action="append", help="default: both")
    parser.add_argument("--method", action="append", help="default: every method that is registered")
    parser.add_argument("--pairs", type=int, default=3, help="of calls, for each prompt (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument(
        "--out", type=Path, help="result file (default: benchmarks/results, for all methods and models)"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print, save."""
    warnings.simplefilter("ignore", NothingDroppedWarning)
    for method in options.method or ():
        check(method)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    came_from, start = origin(torch.device(options.device), SEED), time.perf_counter()
    try:
        names = options.model or list(BUDGETS)
        found = [row for name in names for row in rows(name, options.method, options.pairs, options.device)]
    finally:
        torch.set_num_threads(threads)
    show(found, Console())
    name = "method_time" if options.device == "cpu" else f"method_time_{options.device.split(':')[0]}"
    default = None if options.method or options.model else RESULTS / f"{name}.json"
    out = options.out or default
    if out is not None:
        clock = "processor time of one thread" if options.device == "cpu" else "wall clock, waiting for the device"
        what = f"what each method takes of the time to the first token, one prompt at a time ({clock})"
        took = significant((time.perf_counter() - start) / 60, 2)
        result = {"what": what, "clock": clock, **came_from, "split": "train", "pairs": options.pairs, "minutes": took}
        save(out, result | {"rows": found})
    return 0
