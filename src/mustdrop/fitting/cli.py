"""`mustdrop fit`: train a scorer from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mustdrop.errors import ConfigError

if TYPE_CHECKING:
    from mustdrop.eval.benchmark import Item
    from mustdrop.fitting import Fitted, Look

_SHOWN = 10  # left-out prompts that are named on the screen
_ROWS = 12  # looks in the table

notes = Console(stderr=True)


def command(
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a model; default: the bundled one.")] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help='Lines of {"image": FILE, "question": TEXT}, or a .csv; FILE from this file\'s folder.'),
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="Questions of a benchmark of `eval`, in place of --samples.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the benchmark's files.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data set of `datasets` in place of the benchmark's files.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the benchmark or data set.")] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Use at most this many prompts, the first ones.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the scorer, and of the fit, which goes on there.")] = Path(
        "scorer"
    ),
    steps: Annotated[int, typer.Option(help="Steps at most.")] = 400,
    batch: Annotated[int, typer.Option(help="Prompts of a step.")] = 8,
    budgets: Annotated[
        str, typer.Option(help="Smallest and largest share of the tokens that is practised.")
    ] = "0.04,0.5",
    question: Annotated[
        bool,
        typer.Option("--question/--no-question", help="The scorer reads the question: for one question per picture."),
    ] = False,
    held_out: Annotated[float, typer.Option(help="Share of the prompts that only tells when to stop.")] = 0.1,
    every: Annotated[int, typer.Option(help="Steps between two looks at them.")] = 25,
    patience: Annotated[int, typer.Option(help="Looks without a better result after which training ends.")] = 6,
    rate: Annotated[float, typer.Option(help="Rate of learning.")] = 2e-3,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens after which an answer is cut off.")] = 32,
    frames: Annotated[int, typer.Option(help="Frames of a video that the model sees.")] = 8,
    template: Annotated[str, typer.Option(help="Conversation: auto, vicuna_v1 or processor.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of weights, order, budgets and noise.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: a GPU if any.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights of --model: auto, float32, bfloat16, float16.")] = "auto",
) -> None:
    """Train a small scorer that says which vision tokens a model needs, on your own pictures and prompts.

    No right answers are needed: the model is frozen and answers with all of its vision tokens, and the scorer learns
    which of them the answers need. A prompt that cannot be used is named and left out. Given again, the same command
    goes on where it was interrupted.

    Examples:
        python -m mustdrop fit --model llava-hf/llava-1.5-7b-hf --samples mine.jsonl --out scorer

        python -m mustdrop fit --benchmark scenes --split train --limit 160 --steps 40 --out scorer

        python -m mustdrop eval scenes --method learned --knob importance=scorer --keep 64
    """
    from transformers.utils import logging

    from mustdrop.cli.common import check_folder, check_run
    from mustdrop.eval.prompts import check_template, prompter
    from mustdrop.fitting import FitSettings, examples, fit
    from mustdrop.provenance import provenance

    settings: dict[str, Any] = {
        "steps": steps, "batch": batch, "budgets": _pair(budgets), "question": question, "held_out": held_out,
        "every": every, "patience": patience, "rate": rate, "max_new_tokens": max_new_tokens, "seed": seed,
    }  # fmt: skip
    FitSettings(**settings)  # this and what follows fails before a model is loaded
    check_run((), (), device, dtype)
    check_folder(out)
    check_template(template)
    items = _items(samples, benchmark, data, dataset, split, limit, frames)
    logging.disable_progress_bar()  # there is one of our own
    loaded, processor = _load(model, device, dtype)
    ask = prompter(processor, loaded.config, template)
    with _bar(steps) as on_step:
        fitted = fit(
            loaded,
            examples.samples(items, ask),
            out,
            names=[f"{item.id} ({item.text[:40]})" for item in items],
            about={"name": model or "bundled", "template": ask.name, **provenance(seed)},
            on_step=on_step,
            **settings,
        )
    _report(fitted, out)


def _pair(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--budgets {text!r}: expected two shares, e.g. 0.04,0.5.") from None
    return low, high


def _items(
    samples: Path | None,
    benchmark: str | None,
    data: Path | None,
    dataset: str | None,
    split: str | None,
    limit: int | None,
    frames: int,
) -> list[Item]:
    """The prompts."""
    from mustdrop.eval.benchmark import Source
    from mustdrop.fitting import examples

    if (samples is None) == (benchmark is None):
        raise ConfigError("give either --samples FILE or --benchmark NAME: the pictures and prompts to learn from.")
    if samples is not None:
        extra = [f"--{name}" for name, given in {"data": data, "dataset": dataset, "split": split}.items() if given]
        if extra:
            raise ConfigError(f"{' and '.join(extra)} belong to --benchmark, and --samples was given: leave them out.")
        return examples.read(samples, frames)[:limit]
    rows, assigned = None, split
    if dataset is not None:
        from mustdrop.eval.dataset_rows import load_rows

        rows, assigned = load_rows(dataset, split)
    return examples.of_benchmark(str(benchmark), Source(data, rows, assigned, limit=limit, frames=frames))


def _load(model: str | None, device: str | None, dtype: str) -> tuple[Any, Any]:
    """The model and its processor."""
    from mustdrop.loading import load_model, place

    if model is not None:
        return load_model(model, device=device, dtype=dtype)
    from mustdrop.demo.model import load

    loaded, processor = load()
    return loaded.to(place(device)), processor


@contextmanager
def _bar(steps: int) -> Iterator[Any]:
    """A progress bar, as a callback for `fit`; a log file gets a line for each look in its place."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=notes, transient=True) as progress:
        task = progress.add_task("answering the held-out prompts", total=steps)
        told: list[float | None] = []
        if not notes.is_terminal:  # the first line of a log: what comes before the first step takes a while
            notes.print("answering the held-out prompts", highlight=False)

        def on_step(look: Look) -> None:
            said = "" if look.best is None else f"divergence {look.held:.4f}, best {look.best:.4f}"
            left = f", {look.skipped} left out" if look.skipped else ""
            progress.update(task, completed=look.step, description=f"{said}{left}")
            if not notes.is_terminal and (not told or told[-1] != look.held):
                told.append(look.held)
                notes.print(f"step {look.step} of {look.steps}: {said}{left}", highlight=False)

        try:
            yield on_step
        except KeyboardInterrupt:
            notes.print("Interrupted. The same command goes on from where it last wrote.", highlight=False)
            raise


def _report(fitted: Fitted, out: Path) -> None:
    """What came of it."""
    table = Table(title="Divergence from the unpruned answers, held-out prompts (nats per token)", title_justify="left")
    budgets = list(fitted.log[0]["held_at"])
    for header in ("step", "in training", *(f"{float(keep):.1%}" for keep in budgets), "mean"):
        table.add_column(header, justify="right")
    stride = -(-len(fitted.log) // _ROWS)
    for line in [*fitted.log[:-1:stride], fitted.log[-1]]:
        loss = "" if line["loss"] is None else f"{line['loss']:.4f}"
        best = "bold" if line["step"] == fitted.step else None
        held = [f"{line['held_at'][keep]:.4f}" for keep in budgets]
        table.add_row(str(line["step"]), loss, *held, f"{line['held']:.4f}", style=best)
    console = Console()
    console.print(table)
    if fitted.skipped:
        were = "prompt was" if len(fitted.skipped) == 1 else "prompts were"
        notes.print(f"{len(fitted.skipped)} {were} left out:", style="red")
        for name, why in list(fitted.skipped.items())[:_SHOWN]:
            notes.print(f"  {name}: {why}", markup=False, highlight=False, soft_wrap=True)
        if len(fitted.skipped) > _SHOWN:
            notes.print(f"  and {len(fitted.skipped) - _SHOWN} more.")
    if fitted.step == 0:
        notes.print(
            "No look was better than the one before training: the scorer is untrained, and ranks at random. "
            "Give more prompts, more --steps, or another --rate, and another --out.",
            style="red",
        )
    console.print(
        f"Ended: {fitted.ended}. Wrote the scorer of step {fitted.step} to {out}. To use it:",
        markup=False,
        soft_wrap=True,
    )
    console.print(f'  mustdrop.patch(model, "learned", importance="{out}", keep=...)', markup=False, soft_wrap=True)
