"""Every operation of `mustdrop.kernels`: time, bandwidth, FLOP/s and share of the roofline, beside eager PyTorch.

Three variants of each operation: what the library runs on the device (`kernel`: Triton on a GPU), the PyTorch reference
(`eager`) and `torch.compile` of the reference (`compiled`). Two clocks: `device` is the time on the GPU alone, with its
cache flushed before every call and the launches queued before it starts; `call` is the time per call of many calls in a
row, launches from Python included. The variants take turns, and the ratio of neighbours is what is compared.

Bytes and FLOPs are those that the operation cannot do without (every input read once, every output written once, one
product of queries and keys), so the share of the roofline charges a kernel for what it does twice. The ceilings, those
of a copy, a matrix product and an empty launch, are measured in the same run.

On a CPU there is no kernel to measure: the references run at tiny sizes, and every row says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, Clock, origin, ratios, save, significant, spread
from benchmarks.kernel_works import SIZES, TINY, Size, Work, scoring, works
from mustdrop import kernels

HEAD_START = 4_000_000  # cycles, some two milliseconds
GROWTH = (576, 1152, 2304, 4608, 9216, 18432, 32768)


class Timer:
    """Both clocks of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.clock = device, Clock(device)
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(1 << 28, dtype=torch.uint8, device=device) if self.cuda else None

    def call(self, function: Callable[[], Any], times: int) -> float:
        """Seconds per call of `times` calls in a row."""
        start = self.clock()
        for _ in range(times):
            function()
        return (self.clock() - start) / times

    def on_device(self, function: Callable[[], Any]) -> float | None:
        """Seconds on the GPU with a cold cache. It sleeps first, so that the host is through with all launches."""
        if self.flush is None:
            return None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3


def ceilings(timer: Timer, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Bytes per second of a copy (read and written), FLOP/s of a matrix product, seconds of a launch for one byte."""
    size, side = (1 << 30, 8192) if timer.cuda else (1 << 24, 256)
    source = torch.empty(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=timer.device, dtype=dtype) for _ in range(2))

    def best(function: Callable[[], Any]) -> float:
        return min(timer.on_device(function) or timer.call(function, 1) for _ in range(rounds + 3))

    copied, multiplied, one = best(lambda: target.copy_(source)), best(lambda: a @ b), source[:1]
    return {
        "bytes_per_second": significant(2 * size / copied),
        "flops": significant(2 * side**3 / multiplied),
        "launch_seconds": significant(best(lambda: one.zero_())),
    }


def compiled(work: Work) -> Callable[[], Any] | str:
    """`torch.compile` of the reference, or why there is none."""
    torch._dynamo.reset()
    function = torch.compile(work.eager, dynamic=False)
    try:
        function(*work.arguments)
    except Exception as error:  # whatever a compiler raises: the other variants are still worth measuring
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return lambda: function(*work.arguments)


def measure(work: Work, timer: Timer, roof: dict[str, float], rounds: int, compile_too: bool) -> list[dict[str, Any]]:
    """One row per variant."""
    kind = kernels.implementation(timer.device)
    variants: dict[str, Callable[[], Any]] = {"kernel": work.kernel, "eager": lambda: work.eager(*work.arguments)}
    rows: list[dict[str, Any]] = []
    if compile_too:
        made = compiled(work)
        if isinstance(made, str):
            rows.append({"operation": work.operation, "size": work.size, "variant": "compiled", "failed": made})
        else:
            variants["compiled"] = made
    for function in variants.values():
        for _ in range(2):
            function()
    times = max(1, min(50, int(0.02 / max(1e-6, timer.call(variants["eager"], 1)))))
    calls: dict[str, list[float]] = {name: [] for name in variants}
    devices: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        order = list(variants) if turn % 2 == 0 else list(variants)[::-1]
        for name in order:
            calls[name].append(timer.call(variants[name], times))
            seconds = timer.on_device(variants[name])
            if seconds is not None:
                devices[name].append(seconds)
    bound = max(work.bytes / roof["bytes_per_second"], work.flops / roof["flops"])
    for name in variants:
        seen = devices if timer.cuda else calls
        middle = spread(seen[name])["median"]
        row: dict[str, Any] = {
            "operation": work.operation,
            "size": work.size,
            "variant": name,
            "ran": kind if name == "kernel" else "reference",
            "measures": "a GPU" if timer.cuda else "the reference on a CPU, nothing about the kernels",
            "call_seconds": spread(calls[name]),
            "gbytes_per_second": significant(work.bytes / middle / 1e9),
            "tflops": significant(work.flops / middle / 1e12),
            "share_of_roofline": significant(bound / middle, 3),
            # small operations take no less than a launch, whatever they move
            "share_of_roofline_and_launch": significant((bound + roof["launch_seconds"]) / middle, 3),
            "speed_up_over_eager": ratios(seen["eager"], seen[name]),
            "call_speed_up_over_eager": ratios(calls["eager"], calls[name]),
        }
        if timer.cuda:
            row["device_seconds"] = spread(devices[name])
        rows.append(row)
    return rows


def growth(timer: Timer, dtype: torch.dtype, rounds: int, tiny: bool) -> list[dict[str, Any]]:
    """The cost of scoring by the number of vision tokens, at a fixed text."""
    out = []
    for n in GROWTH if not tiny else (64, 128, 256):
        base = TINY[0] if tiny else SIZES[0]
        size = Size(f"{n} vision tokens", n, base.heads, base.groups, base.hidden, 1, 2, base.dim, base.text)
        work = scoring(size, timer.device, dtype)
        row: dict[str, Any] = {"vision_tokens": n, "text_tokens": size.text}
        for name, function in (("kernel", work.kernel), ("eager", lambda w=work: w.eager(*w.arguments))):
            function()
            seconds = [timer.on_device(function) or timer.call(function, 3) for _ in range(rounds)]
            row[name] = spread(seconds)
        out.append(row)
    return out


@torch.inference_mode()
def benchmark(options: argparse.Namespace, step: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything."""
    device = torch.device(options.device)
    timer, dtype = Timer(device), torch.bfloat16 if device.type == "cuda" else torch.float32
    tiny = options.quick or not timer.cuda
    came_from = origin(device, options.seed)
    torch.manual_seed(options.seed)
    roof = ceilings(timer, dtype, options.rounds)
    rows = []
    start = time.perf_counter()
    for size in TINY if tiny else SIZES:
        for work in works(size, device, dtype):
            step(f"{work.operation}, {size.name}")
            spare = options.seconds is None or time.perf_counter() - start < options.seconds
            compile_too = timer.cuda and spare and size.name in ("tiny", SIZES[1].name, SIZES[-1].name)
            rows += measure(work, timer, roof, options.rounds, compile_too)
    step("growth")
    return {
        "what": "the operations of mustdrop.kernels: time, bandwidth, FLOP/s, share of the roofline",
        "valid": timer.cuda and not options.quick,
        "note": "" if timer.cuda else "No GPU: the references ran on the CPU at tiny sizes. No row is about a kernel.",
        **came_from,
        "dtype": str(dtype).removeprefix("torch."),
        "ceilings": roof,
        "rounds": options.rounds,
        "rows": rows,
        "growth": growth(timer, dtype, options.rounds, tiny),
    }


def report(result: dict[str, Any], console: Console) -> None:
    """The result on the terminal."""
    table = Table("operation", "size", "variant", "ran", "call us", "device us", "GB/s", "roofline", "over eager")
    for row in result["rows"]:
        if "failed" in row:
            table.add_row(row["operation"], row["size"], row["variant"], row["failed"])
            continue
        device = row.get("device_seconds", {}).get("median")
        table.add_row(
            row["operation"],
            row["size"],
            row["variant"],
            row["ran"],
            f"{row['call_seconds']['median'] * 1e6:.1f}",
            "" if device is None else f"{device * 1e6:.1f}",
            f"{row['gbytes_per_second']:.0f}",
            f"{row['share_of_roofline']:.0%}",
            f"{row['speed_up_over_eager']['median']:.2f}",
        )
    console.print(table)
    if result["note"]:
        console.print(result["note"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks kernels`."""
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few rounds: does it run?")
    parser.add_argument("--rounds", type=int, help="how often the variants take turns (default 11)")
    parser.add_argument("--seconds", type=float, help="stop compiling references after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results on a GPU, else none)")


def run(options: argparse.Namespace) -> int:
    """Measure, print, save."""
    options.rounds = options.rounds or (2 if options.quick else 11)
    console = Console()
    result = benchmark(options, lambda text: console.print(text, style="dim"))
    report(result, console)
    cuda = options.device.startswith("cuda") and not options.quick
    out = options.out or (RESULTS / "kernels_cuda.json" if cuda else None)
    if out is not None:
        save(out, result)
    return 0
