"""A trace as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mustdrop.trace import Trace


def quantity(value: float, unit: str) -> str:
    """A number with a metric prefix: 1.23 GFLOPs."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 1000 or prefix == "P":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"


def groups(trace: Trace) -> Iterator[tuple[int, int]]:
    """Runs of decoder layers (first, last) with the same tokens and cache lengths."""
    layers = trace.tokens.shape[0]
    first = 0
    for i in range(1, layers + 1):
        same = i < layers and bool(
            (trace.tokens[i] == trace.tokens[first]).all() and (trace.kv_lengths[i] == trace.kv_lengths[first]).all()
        )
        if not same:
            yield first, i - 1
            first = i


def table(trace: Trace) -> str:
    """The trace as text: tokens and cache per layer and sample, then costs."""
    from rich.console import Console
    from rich.table import Table

    batch = trace.tokens.shape[1]
    shown = range(min(batch, 4))
    rich = Table(title=f"mustdrop trace: {trace.method}", title_justify="left")
    rich.add_column("decoder layers")
    for b in shown:
        name = f"sample {b}\n" if batch > 1 else ""
        rich.add_column(f"{name}vision tokens", justify="right")
        rich.add_column("cache entries", justify="right")
    rich.add_row("prompt", *[cell for b in shown for cell in (str(int(trace.total[b])), "")], end_section=True)
    for first, last in groups(trace):
        name = f"{first}" if first == last else f"{first}-{last}"
        entries = ["state" if first in trace.recurrent else str(int(trace.kv_lengths[first, b])) for b in shown]
        rich.add_row(name, *[cell for b in shown for cell in (str(int(trace.tokens[first, b])), entries[b])])
    rich.add_section()
    rich.add_row("tokens per layer", *[cell for b in shown for cell in (f"{float(trace.equal_tokens[b]):.2f}", "")])
    rich.add_row("entries per layer", *[cell for b in shown for cell in ("", f"{float(trace.equal_entries[b]):.2f}")])
    if any(own.shape[1] > 1 for own in trace.kv_pictures):
        shares = ["; ".join(f"{n:.1f}" for n in trace.kv_pictures[b].float().mean(0).tolist()) for b in shown]
        rich.add_row("of each picture", *[cell for share in shares for cell in ("", share)])
    console = Console(width=40 + 34 * len(shown), color_system=None)
    with console.capture() as capture:
        console.print(rich)
        if batch > len(shown):
            console.print(f"(and {batch - len(shown)} more samples)")
        console.print(
            f"FLOPs of the prompt  {quantity(trace.flops.actual, 'FLOPs')} of "
            f"{quantity(trace.flops.unpruned, 'FLOPs')} ({trace.flops.ratio:.1%})\n"
            f"FLOPs a decode step  {trace.flops.parts['decode_step'].ratio:.1%} of the unpruned step\n"
            f"KV cache             {quantity(trace.kv_bytes.actual, 'B')} of "
            f"{quantity(trace.kv_bytes.unpruned, 'B')} ({trace.kv_bytes.ratio:.1%})\n"
            f"backend              {trace.backend}\n"
            f"kernels              {trace.kernels}",
            highlight=False,
        )
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
