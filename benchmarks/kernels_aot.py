"""Every Triton kernel compiled ahead of time, for GPUs that this machine need not have.

The launchers run as they would on a device, on tensors of real sizes that are never filled, with a driver in place
that only names its target: each launch compiles what it would have launched. Of every result the registers, the spilled
bytes and the shared memory are read, from the assembler (NVIDIA) or from the assembly's own metadata (AMD). No time is
measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, save

BFLOAT16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
# bytes of shared memory that one program may have; a launch with more fails, and the compiler does not say so
SHARED = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}


def attention(heads: int, groups: int, dim: int, keys: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries, keys, rows and visibility of one layer, unfilled."""
    q = torch.empty(1, heads, keys, dim, dtype=dtype)
    k = torch.empty(1, groups, keys, dim, dtype=dtype)
    return q, k, torch.zeros(1, rows, dtype=torch.long), torch.empty(1, rows, keys, dtype=torch.bool)


def cases() -> dict[str, Callable[[], Any]]:
    """Calls of the launchers: a name, and what to call."""
    from mustdrop.kernels.triton import attention as text
    from mustdrop.kernels.triton import bipartite, decode, duplicates, gathering, greedy, matching, merging, selecting

    def statistics(*sizes: Any, softcap: float | None = None, biased: bool = False) -> Callable[[], Any]:
        def call() -> Any:
            q, k, rows, visible = attention(*sizes)
            bias = torch.empty(1, 1, *visible.shape[1:], dtype=q.dtype) if biased else None
            return text.text_statistics(q, k, rows, visible, 0.1, bias, softcap)

        return call

    def sums(*sizes: Any) -> Callable[[], Any]:
        def call() -> Any:
            q, k, rows, visible = attention(*sizes)
            return text.text_sums(q, k, rows, visible, 0.1)

        return call

    def rows_of(*sizes: Any) -> Callable[[], Any]:
        def call() -> Any:
            q, k, rows, visible = attention(*sizes)
            return text.row_probabilities(q, k, rows, visible, 0.1)

        return call

    def scores(heads: int, groups: int, dim: int, keys: int, dtype: torch.dtype) -> Callable[[], Any]:
        return lambda: decode.key_scores(
            torch.empty(1, heads, dim, dtype=dtype),
            torch.empty(1, groups, keys, dim, dtype=dtype),
            torch.empty(1, keys, dtype=torch.bool),
            0.1,
        )

    def windows(tokens: int, channels: int, n: int, dtype: torch.dtype) -> Callable[[], Any]:
        index = torch.zeros(tokens // n, n, dtype=torch.long)
        return lambda: merging.window_similarity(torch.empty(1, tokens, channels, dtype=dtype), index)

    def merge(tokens: int, channels: int, dtype: torch.dtype, weighted: bool) -> Callable[[], Any]:
        slot = torch.zeros(1, tokens, dtype=torch.long)
        weight = torch.empty(1, tokens) if weighted else None
        return lambda: merging.merge_tokens(torch.empty(1, tokens, channels, dtype=dtype), slot, tokens // 2, weight)

    def match(tokens: int, channels: int, dtype: torch.dtype) -> Callable[[], Any]:
        x = torch.empty(1, tokens, channels, dtype=dtype)
        return lambda: matching.best_match(x[:, ::2], x[:, 1::2])

    def slots(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Callable[[], Any]:
        return lambda: bipartite.bipartite_slots(torch.empty(1, heads, tokens, dim, dtype=dtype), tokens // 3, 1)

    def sized(tokens: int, channels: int, dtype: torch.dtype) -> Callable[[], Any]:
        slot = torch.zeros(1, tokens, dtype=torch.long)
        known = torch.empty(1, tokens), slot
        return lambda: bipartite.merge_sized(torch.empty(1, tokens, channels, dtype=dtype), slot, tokens // 2, *known)

    def followed(tokens: int, moves: int) -> Callable[[], Any]:
        return lambda: bipartite.followed([torch.zeros(1, tokens - 10 * i, dtype=torch.long) for i in range(moves)])

    def gather(tokens: int, channels: int, dim: int, dtype: torch.dtype) -> Callable[[], Any]:
        hidden, tables = torch.empty(1, tokens, channels, dtype=dtype), torch.empty(2, 1, tokens, dim, dtype=dtype)
        index, place = torch.zeros(1, tokens // 4, dtype=torch.long), torch.zeros(1, tokens, dtype=torch.long)
        return lambda: gathering.gather_rows([hidden, *tables, place], index, True)

    def cut(tokens: int, dtype: torch.dtype) -> Callable[[], Any]:
        index = torch.zeros(1, tokens // 4, dtype=torch.long)
        return lambda: gathering.cut_mask(torch.empty(1, 1, tokens, tokens, dtype=dtype), index, index)

    def compact(layers: int, groups: int, tokens: int, dim: int, dtype: torch.dtype) -> Callable[[], Any]:
        cache = [torch.empty(1, groups, tokens, dim, dtype=dtype) for _ in range(layers)]
        return lambda: gathering.compact(cache, torch.zeros(1, tokens // 4, dtype=torch.long))

    def each(layers: int, groups: int, tokens: int, dim: int, dtype: torch.dtype) -> Callable[[], Any]:
        cache = [torch.empty(1, groups, tokens, dim, dtype=dtype) for _ in range(2 * layers)]
        index, slots = torch.zeros(layers, 1, tokens // 4, dtype=torch.long), [tokens // 4 - i for i in range(layers)]
        return lambda: gathering.compact_each(cache, index, torch.tensor(slots), slots)

    def farthest(tokens: int, channels: int, count: int, dtype: torch.dtype) -> Callable[[], Any]:
        return lambda: greedy.farthest_first(torch.empty(1, tokens, channels, dtype=dtype), count)

    def determinant(tokens: int, channels: int, count: int, dtype: torch.dtype) -> Callable[[], Any]:
        x, alive = torch.empty(1, tokens, channels, dtype=dtype), torch.empty(1, tokens, dtype=torch.bool)
        counts = torch.empty(1, dtype=torch.long)
        return lambda: greedy.greedy_determinant(x, torch.empty(1, tokens), count, alive, counts)

    def coverage(tokens: int, count: int, dtype: torch.dtype) -> Callable[[], Any]:
        x = torch.empty(1, tokens, tokens, dtype=dtype)
        return lambda: greedy.greedy_coverage(x, count, torch.empty(1, tokens))

    def without(tokens: int, channels: int, count: int, dtype: torch.dtype) -> Callable[[], Any]:
        x, order = torch.empty(1, tokens, channels, dtype=dtype), torch.zeros(1, tokens, dtype=torch.long)
        return lambda: duplicates.without_duplicates(x, order, count)

    def select(tokens: int, slots: int) -> Callable[[], Any]:
        flags = torch.empty(1, tokens, dtype=torch.bool)
        given = (torch.empty(1, 2, tokens), flags, torch.empty(1, dtype=torch.long), slots, flags)
        return lambda: selecting.select(*given, torch.empty(1, tokens))

    return {
        "text statistics, LLaVA-1.5-7B": statistics(32, 32, 128, 640, 64, BFLOAT16),
        "text statistics, Qwen2.5-VL-7B, 16k": statistics(28, 4, 128, 16448, 64, BFLOAT16),
        "text statistics, softcap and bias, head dim 256": statistics(
            8, 4, 256, 2944, 64, BFLOAT16, softcap=50.0, biased=True
        ),
        "text statistics, float32, head dim 128": statistics(32, 32, 128, 640, 64, FLOAT),
        "text sums, LLaVA-1.5-7B": sums(32, 32, 128, 640, 64, BFLOAT16),
        "text sums, Qwen2.5-VL-7B, all rows of 4k": sums(28, 4, 128, 4096, 4096, BFLOAT16),
        "text rows, LLaVA-NeXT": rows_of(32, 32, 128, 2944, 64, BFLOAT16),
        "received attention, SigLIP, head dim 72": lambda: text.received_attention(
            *(torch.empty(2, 1, 16, 729, 72, dtype=HALF)), torch.ones(1, 729, dtype=torch.bool), 0.1
        ),
        "key scores, LLaVA-1.5-7B": scores(32, 32, 128, 640, BFLOAT16),
        "key scores, Qwen2.5-VL-7B, 16k": scores(28, 4, 128, 16448, BFLOAT16),
        "window similarity, CLIP 3x3": windows(576, 1024, 9, BFLOAT16),
        "window similarity, 4096 channels 3x3": windows(576, 4096, 9, BFLOAT16),
        "window similarity, Qwen2.5-VL-7B 2x2": windows(16384, 3584, 4, BFLOAT16),
        "window similarity, float32, 8192 channels": windows(576, 8192, 9, FLOAT),
        "merge, CLIP": merge(576, 1024, BFLOAT16, weighted=False),
        "merge, weighted, Qwen2.5-VL-7B": merge(16384, 3584, BFLOAT16, weighted=True),
        "best match, 128 channels": match(16384, 128, BFLOAT16),
        "best match, 1024 channels, float32": match(576, 1024, FLOAT),
        "bipartite slots, CLIP": slots(577, 16, 64, BFLOAT16),
        "bipartite slots, 4096 tokens, head dim 72": slots(4096, 16, 72, BFLOAT16),
        "bipartite slots, float32, head dim 256": slots(1024, 8, 256, FLOAT),
        "merge with sizes, CLIP": sized(577, 1024, BFLOAT16),
        "merge with sizes, 4096 tokens, float32": sized(4096, 4096, FLOAT),
        "24 moves followed": followed(577, 24),
        "farthest first, LLaVA-1.5-7B": farthest(576, 4096, 192, BFLOAT16),
        "farthest first, 4096 tokens": farthest(4096, 3584, 1024, BFLOAT16),
        "farthest first, 16384 tokens, float32": farthest(16384, 3584, 2048, FLOAT),
        "determinant, LLaVA-1.5-7B": determinant(576, 4096, 192, BFLOAT16),
        "determinant, 4096 tokens": determinant(4096, 3584, 1024, BFLOAT16),
        "determinant, 16384 tokens, float32": determinant(16384, 3584, 2048, FLOAT),
        "coverage, 576 tokens": coverage(576, 192, FLOAT),
        "coverage, 4096 tokens": coverage(4096, 1024, FLOAT),
        "without duplicates, LLaVA-1.5-7B": without(480, 1024, 96, BFLOAT16),
        "select, LLaVA-1.5-7B": select(576, 192),
        "select, 4096 tokens": select(4096, 1024),
        "select, 8192 tokens": select(8192, 4096),
        "gather, LLaVA-1.5-7B": gather(640, 4096, 128, BFLOAT16),
        "gather, Qwen2.5-VL-7B, float32 tables": gather(16448, 3584, 128, FLOAT),
        "cut of a mask": cut(2944, torch.bool),
        "cut of an additive mask": cut(2944, BFLOAT16),
        "cache compaction, LLaVA-1.5-7B": compact(64, 32, 640, 128, BFLOAT16),
        "cache compaction by layer, LLaVA-1.5-7B": each(32, 32, 640, 128, BFLOAT16),
        "cache compaction, Qwen2.5-VL-7B, 16k": compact(8, 4, 16448, 128, BFLOAT16),
    }


class _Named:
    """A driver that only names its target. It is the device too: the compiler keeps one binder per device."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        return self.target

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextlib.contextmanager
def compiling(name: str) -> Iterator[list[Any]]:
    """Every launch compiles for the target and runs nothing; the list collects what was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    from mustdrop.kernels.triton.common import assumed

    made: list[Any] = []
    launch, before = jit.JITFunction.run, driver._active

    def warm(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        made.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(_Named(GPUTarget(*TARGETS[name])))
    jit.JITFunction.run = warm
    assumed["roomy"] = name == "sm_90"
    try:
        yield made
    finally:
        jit.JITFunction.run, driver._active, assumed["roomy"] = launch, before, True


def usage(compiled: Any, target: str) -> dict[str, int]:
    """Registers per thread, spilled bytes (AMD: registers) and bytes of shared memory of one compiled kernel."""
    shared = {"shared": int(compiled.metadata.shared), "warps": int(compiled.metadata.num_warps)}
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        found = {name: _number(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")}
        return {"registers": found["vgpr_count"], "spills": found["vgpr_spill_count"], **shared}
    import triton
    from packaging.version import Version
    from triton.backends.nvidia.compiler import get_ptxas

    # the options that triton itself gives to the assembler: with others it allocates other registers
    options = ["-lineinfo"] + (["--regAllocOptLevel=2"] if Version(triton.__version__) >= Version("3.9") else [])
    ptx = compiled.asm["ptx"]
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert arch is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [
            get_ptxas(TARGETS[target][1]).path,
            "-v",
            *options,
            f"--gpu-name={arch[1]}",
            str(path),
            "-o",
            os.devnull,
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    return {"registers": _number(r"Used (\d+) registers", log), "spills": spills, **shared}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in what the compiler says")
    return int(found[1])


def measure(only: str = "", targets: tuple[str, ...] = tuple(TARGETS)) -> list[dict[str, Any]]:
    """One row per case, kernel and target."""
    rows: list[dict[str, Any]] = []
    for case, call in cases().items():
        if only not in case:
            continue
        for target in targets:
            with compiling(target) as made:
                call()
            seen = {compiled.metadata.hash: compiled for compiled in made}
            for compiled in seen.values():
                numbers = usage(compiled, target)
                fits = numbers["spills"] == 0 and numbers["shared"] <= SHARED[target]
                rows.append({"case": case, "kernel": compiled.metadata.name, "target": target, **numbers, "good": fits})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks kernels_aot`."""
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/kernels_aot.json)")


def run(options: argparse.Namespace) -> int:
    """Compile, print, save; 1 where a kernel spills or asks for more shared memory than there is."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 leaves nothing to compile", file=sys.stderr)
        return 2
    import triton

    from mustdrop.provenance import provenance

    rows = measure(options.only, tuple(options.target or TARGETS))
    for row in rows:
        print(*row.values())
    came_from = provenance(seed=0)
    came_from["versions"] |= {"triton": triton.__version__}
    whole = not options.only and not options.target
    out = options.out or (RESULTS / "kernels_aot.json" if whole else None)
    if out is not None:
        what = "kernels compiled ahead of time; nothing was run"
        save(out, {"what": what, **came_from, "shared_limit": SHARED, "rows": rows})
    return int(not all(row["good"] for row in rows))
