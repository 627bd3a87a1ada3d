"""What `python -m mustdrop eval` prints: a result, several side by side, and what failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mustdrop.budget import keep_text
from mustdrop.eval.result import RESULT, EvalResult

_SHOWN = 20  # failures that are printed; the result file has all

console = Console()
notes = Console(stderr=True)


def table(result: EvalResult) -> Table:
    """A result for the terminal."""
    keep = "" if result.keep is None else f" keep={keep_text(result.keep)}"
    shown = Table(
        title=f"{result.title}: {result.model.name}, {result.method}{keep}", title_justify="left", show_header=False
    )
    shown.add_column("what")
    shown.add_column("value", overflow="fold")
    headline = "scored by a server: upload the answers" if result.score is None else f"{result.score:.2f}"
    shown.add_row(f"{result.headline} (of {result.headline_max:g})", headline, style="bold")
    for name, score in result.scores.items():
        if name != result.headline:
            shown.add_row(f"  {name}", f"{score:.2f}")
    shown.add_row("metric", result.metric)
    shown.add_row("questions", f"{result.data.asked} of {result.data.questions}, failed {len(result.failed)}")
    if result.tokens is not None:
        equal, every = result.tokens.equal, result.tokens.total
        shown.add_row(
            "tokens per layer",
            f"{equal.mean:.2f} ± {equal.std:.2f} ({equal.min:.2f} to {equal.max:.2f}) of {every.mean:.1f}; counted as "
            f"in the papers' tables {result.tokens.reported.mean:.2f}",
        )
    if result.cost is not None:
        shown.add_row("FLOPs of the prompt", f"{result.cost.flops_ratio:.1%} of the unpruned model's")
        shown.add_row("KV cache", f"{result.cost.kv_bytes / 1e6:.2f} MB, {result.cost.kv_ratio:.1%}")
    if result.latency is not None:
        step = "" if result.latency.decode_ms is None else f", each further one {result.latency.decode_ms:.2f} ms"
        rows = f"calls of {result.latency.batch_size}"
        shown.add_row("latency", f"first token {result.latency.prefill_ms:.1f} ms{step} (median, {rows})")
    if result.method_time is not None:
        own = result.method_time
        told = f"{own.method_ms:.1f} ms of {own.prefill_ms:.1f} ms to the first token ({own.share:.1%})"
        shown.add_row("time of the method", f"{told}; median, {own.questions} questions one by one, each turn clocked")
    parts = ("data", "vision", "prefill", "decode", "other")
    shares = ", ".join(f"{name} {getattr(result.time, name):.1%}" for name in parts)
    shown.add_row("time", f"{result.time.seconds:.1f} s: {shares}")
    shown.add_row("peak memory", f"{result.peak_memory_bytes / 1e9:.2f} GB")
    shown.add_row("prompt", f"{result.prompt.template}, greedy, at most {result.prompt.max_new_tokens} tokens")
    return shown


def print_groups(results: Sequence[tuple[Path, EvalResult]]) -> None:
    """The runs side by side, as `mustdrop report` shows them."""
    from mustdrop.eval.report import group_files
    from mustdrop.eval.report.render import show

    show(group_files({folder / RESULT: result for folder, result in results}), console)
    for folder, _ in results:
        console.print(f"Wrote {folder / RESULT}.", markup=False, highlight=False, soft_wrap=True)


def acceptable(result: EvalResult, most: float) -> bool:
    """Name what failed; whether it is little enough."""
    if not result.failed:
        return True
    notes.print(f"{len(result.failed)} failed ({result.failed_share:.2%}):", style="red")
    for failure in result.failed[:_SHOWN]:
        notes.print(f"  {failure.name}: {failure.reason}", markup=False, highlight=False, soft_wrap=True)
    if len(result.failed) > _SHOWN:
        notes.print(f"  and {len(result.failed) - _SHOWN} more: the result file names all.")
    notes.print("Failed questions count as wrong. Once they are repaired, --retry-failed asks them again.")
    return result.failed_share <= most
