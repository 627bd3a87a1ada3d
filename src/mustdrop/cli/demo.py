"""`mustdrop demo`: questions about one image, without and with pruning at several budgets."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from mustdrop.budget import keep_text
from mustdrop.cli.common import budget, check_folder, check_run, console, write_json
from mustdrop.extras import need

BUDGETS = ["192", "128", "64", "32"]


def demo(
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a model; default: the bundled one.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image file; default: a held-out scene.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="Question; may be given several times.")] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Budget in tokens (64) or as a share (0.25); may be given several times.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method to show at each budget; may be given several times.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: a GPU if any.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights of --model: auto, float32, bfloat16, float16.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for kept.png and demo.json.")] = Path("mustdrop-demo"),
) -> None:
    """Ask questions about one image, without and with pruning at several budgets.

    Prints the answers, the tokens per decoder layer, FLOPs, KV bytes and the measured prefill ratio, and writes the
    picture of the patches that each stage kept.

    Examples:
        python -m mustdrop demo

        python -m mustdrop demo --keep 64 --keep 0.05 --method mustdrop --method uniform

        python -m mustdrop demo --model llava-hf/llava-1.5-7b-hf --image cat.png --question "What is the cat doing?"
    """
    from transformers.utils import logging

    from mustdrop.demo import run

    need("matplotlib", "viz", "the picture of the demo")  # now, not after all questions
    budgets = [budget(text) for text in keep or BUDGETS]
    methods = method or ["mustdrop", "random"]
    questions = question or []
    check_run(methods, budgets, device, dtype)
    check_folder(out)
    logging.disable_progress_bar()  # there is one of our own
    if model is None:
        subject = run.bundled_subject(image, questions, device)
    else:
        subject = run.hub_subject(model, image, questions, dtype, device)
    steps = iter(track(range(len(budgets) * len(methods)), "asking", console=Console(stderr=True), transient=True))
    next(steps)
    rows, trace = run.run(subject, budgets, methods, advance=lambda: next(steps, None))
    _print_demo(subject, rows, trace)
    out.mkdir(parents=True, exist_ok=True)
    trace.draw(subject.items[0].image, out / "kept.png")
    write_json(out / "demo.json", run.record(subject, rows))
    console.print(f"Wrote {out / 'kept.png'} (what each stage kept) and {out / 'demo.json'} (these figures).")


def _print_demo(subject: Any, rows: list[Any], trace: Any) -> None:
    known = any(item.truth is not None for item in subject.items)
    shown = [row for row in rows if row.keep is None or row.method == rows[1].method]
    answers = Table(title=f"Answers of the {subject.name}, unpruned and with {rows[1].method}", title_justify="left")
    answers.add_column("question")
    if known:
        answers.add_column("truth", style="bold")
    for row in shown:
        answers.add_column("unpruned" if row.keep is None else f"keep={keep_text(row.keep)}")
    for i, item in enumerate(subject.shown):
        truth = item.truth
        said = [escape(row.answers[i]) for row in shown]
        marked = [a if truth is None or a == truth else f"[red]{a}[/red]" for a in said]
        answers.add_row(escape(item.question), *([escape(str(truth))] if known else []), *marked)
    console.print(answers)
    cost = Table(title="What it cost, the whole prompt relative to the unpruned model", title_justify="left")
    cost.add_column("setting")
    for header in (*(["right"] if known else []), "tokens per layer", "FLOPs", "KV cache", "prefill time"):
        cost.add_column(header, justify="right")
    cost.add_column("vision tokens per layer")
    for row in rows:
        cost.add_row(
            "unpruned" if row.keep is None else f"{row.method} keep={keep_text(row.keep)}",
            *([f"{row.correct} of {len(subject.items)}"] if known else []),
            f"{row.equal_tokens:.1f}",
            f"{row.flops:.1%}",
            f"{row.kv_bytes / 1e6:.2f} MB, {row.kv_ratio:.1%}",
            "1.00x" if row.prefill_ratio is None else f"{row.prefill_ratio:.2f}x",
            _runs(row.tokens),
        )
    console.print(cost)
    console.print(f"\nThe last {rows[1].method} setting in detail, first question:")
    console.print(str(trace), highlight=False, markup=False)


def _runs(tokens: list[int]) -> str:
    """[576, 576, 192] -> "2x576 192"."""
    groups = [(n, len(list(run))) for n, run in itertools.groupby(tokens)]
    return " ".join(f"{count}x{n}" if count > 1 else str(n) for n, count in groups)
