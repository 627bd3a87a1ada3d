"""mustdrop beside what a user could install instead: one model, one budget, one machine, one run.

Every row is one way to drop vision tokens or cache entries, at one budget, against the same model untouched. Ratios
are of two runs that stood next to each other, and the order of the two alternates. Peers lie in `peer_adapters.py`; one
that this environment cannot measure becomes a row that says why.

The weights are random: this is about time and bytes, and says nothing about what is lost.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import mustdrop
from benchmarks.common import (
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
from benchmarks.packed import pack
from benchmarks.peer_adapters import PEERS, TEXT, Skipped, cause
from mustdrop.errors import NothingDroppedWarning

BUDGETS = (192, 64)
OURS = {"mustdrop": "prefill", "mustdrop+": "prefill", "random": "prefill", "snapkv": "cache", "h2o": "cache"}


@dataclass
class Row:
    """One way to drop at one budget, and what was measured; the lists run over the pairs, in seconds."""

    name: str
    keep: int
    stage: str
    prunes: str
    applied: Callable[[], AbstractContextManager[Any]]
    package: str = "mustdrop"
    version: str = mustdrop.__version__
    remark: str = ""
    untouched: dict[str, list[float]] = field(default_factory=lambda: {"prompt": [], "decode": []})
    dropping: dict[str, list[float]] = field(default_factory=lambda: {"prompt": [], "decode": []})
    stored: dict[str, int] = field(default_factory=dict)
    processed: float = 0.0

    @property
    def describes(self) -> dict[str, Any]:
        """What the row is, measured or not."""
        names = ("name", "package", "version", "keep", "stage", "prunes", "remark")
        return {name: getattr(self, name) for name in names}


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """How many tokens the feed-forward block of each decoder layer processes: what is left after any cut."""
    seen: list[int] = []
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
        for layer in model.model.language_model.layers
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def ours(model: Any) -> list[Row]:
    """The rows of mustdrop's own methods."""

    def applied(method: str, keep: int) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: mustdrop.patched(model, method, keep=keep)

    return [Row(name, keep, stage, "vision", applied(name, keep)) for keep in BUDGETS for name, stage in OURS.items()]


def theirs(model: Any) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of peers that can be imported, and what is to be said of the others."""
    rows, skipped = [], []

    def applied(peer: Any, module: Any, keep: int) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: peer.apply(module, model, keep)

    for peer in PEERS:
        about = {"package": peer.package, "version": peer.version or "", "remark": peer.remark}
        try:
            module = peer.load()
        except Skipped as why:
            skipped.append(
                {"name": peer.name, "stage": peer.stage, "prunes": peer.prunes, **about, "skipped": str(why)}
            )
            continue
        rows += [
            Row(peer.name, keep, peer.stage, peer.prunes, applied(peer, module, keep), **about) for keep in BUDGETS
        ]
    return rows, skipped


def try_out(model: Any, inputs: dict[str, Tensor], row: Row, clock: Clock) -> None:
    """Warm up, and see what is left of tokens and cache; `Skipped` where it fails, or nothing is dropped.

    Raises:
        Skipped: with the cause.
    """
    layers, whole = len(model.model.language_model.layers), TEXT + VISION
    try:
        with row.applied(), counted(model) as seen:
            row.stored["prompt"] = measure(model, inputs, clock, 1)["stored"]
        with row.applied():
            measure(model, inputs, clock, 3)  # some fail only at a decode step
    except Exception as error:  # a peer that this model or transformers breaks must not end the run
        raise Skipped(f"it fails on this model: {cause(error)}") from error
    row.processed = sum(seen[:layers]) / layers
    entries = row.stored["prompt"] / slot(model) / layers
    if row.processed >= whole and entries >= whole:
        raise Skipped(f"it runs and drops nothing: {entries:.0f} cache entries stay in each layer")


def slot(model: Any) -> int:
    """Bytes of one cache entry of one layer."""
    config = model.config.text_config
    return int(2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize)


def one_round(model: Any, inputs: dict[str, Tensor], row: Row, clock: Clock, new: int, swap: bool) -> None:
    """The untouched model and the one that drops next to each other."""
    scope = "prompt" if new == 1 else "decode"

    def untouched() -> None:
        row.untouched[scope].append(measure(model, inputs, clock, new)[scope])

    def dropping() -> None:
        with row.applied():
            seen = measure(model, inputs, clock, new)
        row.dropping[scope].append(seen[scope])
        row.stored[scope] = seen["stored"]

    for run in (dropping, untouched) if swap else (untouched, dropping):
        run()


def summary(model: Any, row: Row, whole: dict[str, int]) -> dict[str, Any]:
    """A row of the result file."""
    per_entry = slot(model) * len(model.model.language_model.layers)
    return {
        **row.describes,
        "tokens_per_layer": significant(row.processed),
        "pairs": {scope: len(times) for scope, times in row.dropping.items()},
        "first_token": {
            "speed_up": ratios(row.untouched["prompt"], row.dropping["prompt"]),
            "seconds_untouched": spread(row.untouched["prompt"]),
            "seconds": spread(row.dropping["prompt"]),
        },
        "decode": {
            "speed_up": ratios(row.untouched["decode"], row.dropping["decode"]),
            "tokens_per_second_untouched": spread([1 / s for s in row.untouched["decode"]]),
            "tokens_per_second": spread([1 / s for s in row.dropping["decode"]]),
        },
        "kv_bytes": {
            f"after_{scope}": {
                "stored": row.stored[scope],
                "untouched": whole[scope],
                "entries_per_layer": significant(row.stored[scope] / per_entry),
            }
            for scope in ("prompt", "decode")
        },
    }


@torch.inference_mode()
def benchmark(options: argparse.Namespace, step: Callable[[str], None]) -> dict[str, Any]:
    """Build, try every row out, measure those that work."""
    began = time.perf_counter()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    clock = Clock(device)
    came_from = origin(device, options.seed)
    step("building")
    model = build(options.size, device, options.seed)
    if options.weights == "packed":
        pack(model)
    inputs = prompt(model, options.seed)
    whole = {
        scope: measure(model, inputs, clock, new)["stored"]
        for scope, new in (("prompt", 1), ("decode", options.steps + 1))
    }
    candidates, skipped = theirs(model)
    rows = []
    for row in ours(model) + candidates:
        step(f"trying {row.name} {row.keep}")
        try:
            try_out(model, inputs, row, clock)
        except Skipped as why:
            skipped.append({**row.describes, "skipped": str(why)})
        else:
            rows.append(row)
    plan = [(row, 1, p) for p in range(options.pairs) for row in rows]
    plan += [(row, options.steps + 1, p) for p in range(options.decode_pairs) for row in rows]
    plan.sort(key=lambda item: item[2])  # where time runs out, every row has as many pairs as any other, or one less
    for row, new, p in plan:
        if p and options.seconds and time.perf_counter() - began > options.seconds:
            break
        step(f"{'prompt' if new == 1 else 'decode'} {row.name} {row.keep} {p + 1}")
        one_round(model, inputs, row, clock, new, swap=p % 2 == 1)
    return {
        "what": "mustdrop and what a user could install instead, each against the untouched LLaVA with random weights",
        **came_from,
        "command": command(options),
        "model": {
            "size": options.size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "text": SIZES[options.size][0],
            "vision": SIZES[options.size][1],
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention": model.config._attn_implementation,
            "weights": options.weights,
        },
        "prompt": {"vision_tokens": VISION, "text_tokens": TEXT, "decode_steps": options.steps},
        "rows": [summary(model, row, whole) for row in rows],
        "skipped": skipped,
    }


def command(options: argparse.Namespace) -> str:
    """What to type for a run like this one."""
    words = ["python -m benchmarks peers", f"--device {options.device}", f"--size {options.size}"]
    words += [f"--weights {options.weights}", f"--pairs {options.pairs}", f"--decode-pairs {options.decode_pairs}"]
    words += [f"--steps {options.steps}", f"--threads {options.threads}", f"--seed {options.seed}"]
    return " ".join(words)


def report(result: dict[str, Any], console: Console) -> None:
    """The result on the terminal."""
    table = Table("", "stage", "keep", "tokens per layer", "first token", "decoding", "cache entries", "KV MiB")
    for row in result["rows"]:
        cache = row["kv_bytes"]["after_prompt"]
        ratios_of = [row[scope]["speed_up"] for scope in ("first_token", "decode")]
        speeds = [f"{r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})" for r in ratios_of]
        sizes = (f"{cache['entries_per_layer']:.1f}", f"{cache['stored'] / 2**20:.1f}")
        tokens = f"{row['tokens_per_layer']:.1f}"
        table.add_row(row["name"], row["stage"], str(row["keep"]), tokens, *speeds, *sizes)
    console.print(table)
    for row in result["skipped"]:
        console.print(f"skipped: {row['name']} {row.get('keep', '')}: {row['skipped']}", markup=False)
    console.print(f"again: {result['command']}", markup=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks peers`."""
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--size", choices=SIZES, help="default: small on a CPU, llava-1.5-7b on a GPU")
    parser.add_argument(
        "--weights",
        choices=("plain", "packed"),
        help="packed: laid out for the processor once, on all sides (benchmarks/packed.py); default on a CPU",
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model and one pair: does it run?")
    parser.add_argument("--pairs", type=int, help="pairs of runs per row (default 6)")
    parser.add_argument("--decode-pairs", type=int, help="pairs of runs per row for decoding (default 3)")
    parser.add_argument("--steps", type=int, default=16, help="decode steps")
    parser.add_argument("--seconds", type=float, help="after so many seconds no further pair of a row is begun")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results, and none for --quick)")


def run(options: argparse.Namespace) -> int:
    """Measure, print, save; skipped rows are no failure."""
    usual = "llava-1.5-7b" if options.device.startswith("cuda") else "small"
    options.size = options.size or ("tiny" if options.quick else usual)
    options.weights = options.weights or ("packed" if options.device == "cpu" else "plain")
    if options.weights == "packed" and options.device != "cpu":
        raise SystemExit("--weights packed is for --device cpu: a GPU's library does not repack weights at every call.")
    options.pairs = options.pairs or (1 if options.quick else 6)
    options.decode_pairs = options.decode_pairs or (1 if options.quick else 3)
    console = Console()
    with warnings.catch_warnings(), Progress(console=console, transient=True) as progress:
        warnings.simplefilter("ignore", NothingDroppedWarning)
        most = len(BUDGETS) * (len(OURS) + len(PEERS))
        task = progress.add_task("", total=1 + most * (1 + options.pairs + options.decode_pairs))
        start = time.perf_counter()
        result = benchmark(options, lambda text: progress.update(task, advance=1, description=text))
    result["minutes"] = significant((time.perf_counter() - start) / 60, 2)
    report(result, console)
    default = None if options.quick else RESULTS / f"peers_{options.device.split(':')[0]}.json"
    out = options.out or default
    if out is not None:
        save(out, result)
    return 0
