"""Time to the first token and its parts, tokens per second, memory: patched against unpatched, as users serve a model.

Rows are model x attention x batch x budget. Every number is a ratio of two runs that stood next to each other, whose
order alternates. The time to the first token has four parts:

- `vision`: the vision tower;
- `prefill`: what the decoder layers take, called directly on as many tokens as the patched run left to each;
- `pruning`: what the language model took beyond that: scores, decisions, gathers, cuts, and Python;
- `rest`: projector, embeddings, language head, `generate`.

Clocks wait for the device, so the parts add up, and their sum is a little more than without clocks. The weights are
random: speed depends on sizes, not on what was learned.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers.utils
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import mustdrop
from benchmarks.common import RESULTS, SIZES, Clock, origin, ratios, save, significant, spread
from benchmarks.hardware import bare
from benchmarks.models import QWEN_SIZES, Subject, subject
from benchmarks.packed import pack
from mustdrop.cost import linear_flops
from mustdrop.errors import NothingDroppedWarning

SHARES = (1.0, 1 / 3, 2 / 9, 1 / 9)
PARTS = ("first_token", "vision", "text")
FLASH = ("flash_attention_2", "flash_attention_3")
FLEX = "flex_attention: it compiles for every new length, so its first calls are long; name it with --attention"


def usable(attention: str, cuda: bool) -> bool:
    """Whether flash attention of a version is installed, and there is a device for it."""
    return cuda and bool(getattr(transformers.utils, f"is_flash_attn_{attention[-1]}_available")())


@dataclass
class Row:
    """One budget of one model and batch; the lists run over the pairs, in seconds or bytes."""

    attention: str
    batch: int
    keep: int
    unpatched: dict[str, list[float]] = field(default_factory=dict)
    patched: dict[str, list[float]] = field(default_factory=dict)
    bare: list[float] = field(default_factory=list)
    trace: Any = None


@contextmanager
def timed(module: nn.Module, clock: Clock) -> Iterator[list[float]]:
    """Start and end of every forward of a module, around whatever is hooked on it."""
    times: list[float] = []
    handles = [
        module.register_forward_pre_hook(lambda *_: times.append(clock()), prepend=True),
        module.register_forward_hook(lambda *_: times.append(clock())),
    ]
    try:
        yield times
    finally:
        for handle in handles:
            handle.remove()


def once(subject: Subject, inputs: dict[str, Tensor], clock: Clock, steps: int) -> dict[str, float]:
    """One `generate` for the first token, one for `steps` more; seconds and bytes.

    One goes before, unclocked: a model is patched once and then serves, so what the first call after `patch` does for
    later ones belongs to no token.
    """
    model, cuda = subject.model, clock.device.type == "cuda"
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, do_sample=False)
    if cuda:
        torch.cuda.reset_peak_memory_stats(clock.device)
    before = torch.cuda.memory_allocated(clock.device) if cuda else 0
    with timed(subject.tower, clock) as vision, timed(model.model.language_model, clock) as text:
        start = clock()
        output = model.generate(**inputs, max_new_tokens=1, min_new_tokens=1, **options)
        end = clock()
    peak = torch.cuda.max_memory_allocated(clock.device) - before if cuda else 0
    layers = output.past_key_values.layers
    stored = sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))
    seen = {
        "first_token": end - start,
        "vision": sum(b - a for a, b in zip(vision[::2], vision[1::2], strict=True)),
        "text": text[1] - text[0],
        "stored": stored,
    }
    if cuda:
        seen["peak"] = peak
    del output, layers
    with timed(model.model.language_model, clock) as text:
        model.generate(**inputs, max_new_tokens=steps + 1, min_new_tokens=steps + 1, **options)
    return seen | {"decode": (text[-1] - text[1]) / steps}


def pair(subject: Subject, inputs: dict[str, Tensor], row: Row, clock: Clock, steps: int, swap: bool) -> None:
    """Unpatched and patched next to each other, then the bare layers."""

    def unpatched() -> None:
        for name, value in once(subject, inputs, clock, steps).items():
            row.unpatched.setdefault(name, []).append(value)

    def patched() -> None:
        with mustdrop.patched(subject.model, "mustdrop", keep=row.keep):
            for name, value in once(subject, inputs, clock, steps).items():
                row.patched.setdefault(name, []).append(value)
            row.trace = mustdrop.trace(subject.model)

    for run in (patched, unpatched) if swap else (unpatched, patched):
        run()
    lengths = [int(n.max()) + subject.text for n in row.trace.tokens]
    row.bare.append(bare(subject.model, lengths, clock, row.batch))


def summary(subject: Subject, row: Row) -> dict[str, Any]:
    """A row of the result file."""
    trace, parts = row.trace, row.trace.flops.parts
    head = row.batch * linear_flops(subject.model.get_output_embeddings())  # outside the language model's forward
    flops = (parts["prefill"].unpruned - head) / (parts["prefill"].actual - head + parts["scoring"].actual)
    whole = 1 / trace.flops.ratio
    text = ratios(row.unpatched["text"], row.patched["text"])
    first = ratios(row.unpatched["first_token"], row.patched["first_token"])
    alone = ratios(row.unpatched["text"], row.bare)
    rest = [a - b - c for a, b, c in zip(*(row.patched[name] for name in PARTS), strict=True)]
    out: dict[str, Any] = {
        "attention": row.attention,
        "batch": row.batch,
        "keep": row.keep,
        "share": significant(row.keep / subject.vision, 3),
        "equal_tokens": significant(float(trace.equal_tokens.mean())),
        "first_token": {
            "flops_ratio": significant(whole),
            "speed_up": first,
            "share_of_flops_ratio": significant(first["median"] / whole, 3),
            "seconds_unpatched": spread(row.unpatched["first_token"]),
            "seconds_patched": spread(row.patched["first_token"]),
        },
        "prefill": {
            "flops_ratio": significant(flops),
            "speed_up": text,
            "share_of_flops_ratio": significant(text["median"] / flops, 3),
            "of_bare_layers": alone,
            "seconds_unpatched": spread(row.unpatched["text"]),
            "seconds_patched": spread(row.patched["text"]),
        },
        "parts": {
            "vision_unpatched": spread(row.unpatched["vision"]),
            "vision": spread(row.patched["vision"]),
            "prefill": spread(row.bare),
            "pruning": spread([p - b for p, b in zip(row.patched["text"], row.bare, strict=True)]),
            "rest": spread(rest),
        },
        "decode": {
            "speed_up": ratios(row.unpatched["decode"], row.patched["decode"]),
            "tokens_per_second_unpatched": spread([row.batch / s for s in row.unpatched["decode"]]),
            "tokens_per_second_patched": spread([row.batch / s for s in row.patched["decode"]]),
        },
        "kv_bytes": {"unpatched": int(row.unpatched["stored"][-1]), "patched": int(row.patched["stored"][-1])},
    }
    if "peak" in row.patched:
        out["peak_bytes"] = {"unpatched": int(row.unpatched["peak"][-1]), "patched": int(row.patched["peak"][-1])}
    return out


@torch.inference_mode()
def benchmark(options: argparse.Namespace, step: Callable[[str], None]) -> dict[str, Any]:
    """Build, warm up, measure."""
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    clock, start = Clock(device), time.perf_counter()
    came_from = origin(device, options.seed)
    subjects = []
    for name in options.model:
        step(f"building {name}")
        subjects.append(subject(name, device, options.attention[0], options.seed))
        if device.type == "cpu" and name in SIZES:
            pack(subjects[-1].model)
    rows: dict[str, list[dict[str, Any]]] = {one.name: [] for one in subjects}
    left_out: list[str] = []
    for attention, one, batch in itertools.product(options.attention, subjects, options.batch):
        if options.seconds is not None and time.perf_counter() - start > options.seconds:
            left_out.append(f"{one.name}, {attention}, batch {batch}: the time was up")
            continue
        one.model.set_attn_implementation(attention)
        inputs = one.prompt(options.seed, batch)
        plan = [Row(attention, batch, max(1, round(one.vision * share))) for share in SHARES]
        for row in plan:  # warm up, and forget
            step(f"{one.name} {attention} {batch} x {row.keep}, warm-up")
            pair(one, inputs, Row(attention, batch, row.keep), clock, options.steps, swap=False)
        for p in range(options.pairs):
            for row in plan:
                step(f"{one.name} {attention} {batch} x {row.keep}, pair {p + 1}")
                pair(one, inputs, row, clock, options.steps, swap=p % 2 == 1)
        rows[one.name] += [summary(one, row) for row in plan]
    models = [
        {
            "model": one.name,
            "parameters": sum(p.numel() for p in one.model.parameters()),
            "dtype": str(one.model.dtype).removeprefix("torch."),
            "vision_tokens": one.vision,
            "text_tokens": one.text,
            "rows": rows[one.name],
        }
        for one in subjects
    ]
    return {
        "what": "time to the first token by parts, decoding, memory: patched against unpatched, random weights",
        "valid": not options.quick,
        **came_from,
        "pairs": options.pairs,
        "decode_steps": options.steps,
        "minutes": significant((time.perf_counter() - start) / 60, 2),
        "left_out": left_out,
        "models": models,
    }


def report(result: dict[str, Any], console: Console) -> None:
    """The result on the terminal."""
    for model in result["models"]:
        table = Table("attention", "batch", "keep", "first token", "prefill", "of FLOPs", "pruning", "decode", "KV")
        for row in model["rows"]:
            parts = row["parts"]
            table.add_row(
                row["attention"],
                str(row["batch"]),
                f"{row['share']:.0%}",
                f"{row['first_token']['speed_up']['median']:.2f}",
                f"{row['prefill']['speed_up']['median']:.2f}",
                f"{row['prefill']['share_of_flops_ratio']:.0%}",
                f"{parts['pruning']['median'] / row['prefill']['seconds_patched']['median']:.0%}",
                f"{row['decode']['speed_up']['median']:.2f}",
                f"{row['kv_bytes']['patched'] / row['kv_bytes']['unpatched']:.0%}",
            )
        console.print(f"{model['model']}, {model['parameters'] / 1e9:.2f} B parameters")
        console.print(table)
    for line in result["left_out"]:
        console.print("left out:", line)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks serving`."""
    names = [*SIZES, *QWEN_SIZES]
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--model", choices=names, action="append", help="default: both of 7 B on a GPU, small on a CPU")
    parser.add_argument(
        "--attention",
        action="append",
        help="an attention implementation (default: sdpa, eager, flash attention where installed)",
    )
    parser.add_argument("--batch", type=int, action="append", help="prompts at a time (default: 1 and 8; 1 on a CPU)")
    parser.add_argument("--quick", action="store_true", help="tiny models and one pair: does it run?")
    parser.add_argument("--pairs", type=int, help="pairs of runs per row (default 5)")
    parser.add_argument("--steps", type=int, default=8, help="decode steps")
    parser.add_argument("--seconds", type=float, help="begin no further batch after this long")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results, and none for --quick)")


def run(options: argparse.Namespace) -> int:
    """Measure, print, save."""
    cuda = options.device.startswith("cuda")
    usual = ["llava-1.5-7b", "qwen2.5-vl-7b"] if cuda else ["small"]
    options.model = options.model or (["tiny", "qwen2.5-vl-tiny"] if options.quick else usual)
    missing: list[str] = []
    if not options.attention:
        flash = [name for name in FLASH if usable(name, cuda)]
        options.attention = ["sdpa", *flash, "eager"]
        missing = [*(f"{name}: not installed" for name in FLASH if name not in flash), FLEX]
    options.batch = options.batch or ([1, 8] if cuda else [1])
    options.pairs = options.pairs or (1 if options.quick else 5)
    console = Console()
    with warnings.catch_warnings(), Progress(console=console, transient=True) as progress:
        warnings.simplefilter("ignore", NothingDroppedWarning)
        each = len(options.attention) * len(options.batch) * len(SHARES) * (options.pairs + 1) + 1
        task = progress.add_task("", total=len(options.model) * each)
        result = benchmark(options, lambda text: progress.update(task, advance=1, description=text))
    result["left_out"] += missing
    report(result, console)
    default = None if options.quick else RESULTS / f"serving_{options.device.split(':')[0]}.json"
    out = options.out or default
    if out is not None:
        save(out, result)
    return 0
