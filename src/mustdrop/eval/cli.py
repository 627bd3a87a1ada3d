"""`python -m mustdrop eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mustdrop.budget import parse_keep
from mustdrop.errors import BudgetError, ConfigError
from mustdrop.eval.benchmarks import benchmarks
from mustdrop.eval.output import acceptable, console, notes, print_groups, table
from mustdrop.eval.progress import Bar
from mustdrop.eval.result import RESULT, EvalResult
from mustdrop.eval.settings import Settings

FAILED = 1  # exit code of a finished run of which too much failed


def evaluate(settings: Settings, watcher: Bar, *loaded: Any) -> EvalResult | None:
    """`mustdrop.eval.run.evaluate`, imported when it is needed: the help should not wait for torch."""
    from mustdrop.eval.run import evaluate

    return evaluate(settings, watcher, *loaded)


def eval_command(
    benchmark: Annotated[str, typer.Argument(help=f"One of: {', '.join(benchmarks())}.")],
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a model; default: the bundled one.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method; `none` is the unpruned model. Default: mustdrop. May be given several times."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Budget in tokens (192) or as a share (0.25). May be given several times, or with commas."),
    ] = None,
    sparse: Annotated[
        bool | None, typer.Option("--sparse/--no-sparse", help="With or without pruning: mustdrop, or none.")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Rank rule: tokens per unit of rank.")] = None,
    bias: Annotated[float | None, typer.Option(help="Rank rule: tokens on top.")] = None,
    global_thr: Annotated[
        float | None, typer.Option("--global-thr", "--global_thr", help="Dual attention filter: gamma.")
    ] = None,
    individual_thr: Annotated[
        float | None, typer.Option("--individual-thr", "--individual_thr", help="Dual attention filter: alpha.")
    ] = None,
    knob: Annotated[
        list[str] | None, typer.Option(help="Any other setting of the method, NAME=VALUE; may be given several times.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the benchmark's files, or with those of all; default: playground/data/eval."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Data set of `datasets` in place of files: hub id (id:config) or folder.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the benchmark or data set.")] = None,
    batch_size: Annotated[int, typer.Option(help="Questions to a call of the model.")] = 8,
    limit: Annotated[int | None, typer.Option(help="Ask at most this many questions.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Choose them at random (default: the first ones). scenes: seed of the scenes.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Frames of a video that the model sees.")] = 8,
    min_pixels: Annotated[
        int | None,
        typer.Option(help="Area to which smaller pictures and frames are enlarged."),
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Area to which larger pictures and frames are shrunk.")] = None,
    total_pixels: Annotated[
        int | None, typer.Option(help="Area of all frames of a video together, to which larger videos are shrunk.")
    ] = None,
    coordinates: Annotated[
        str, typer.Option(help="RefCOCO: numbers of an answer are shares, thousandths or pixels; auto tells by size.")
    ] = "auto",
    template: Annotated[str, typer.Option(help="Conversation: auto, vicuna_v1 or processor.")] = "auto",
    max_new_tokens: Annotated[int | None, typer.Option(help="Limit of an answer; default: the benchmark's.")] = None,
    upright: Annotated[
        bool,
        typer.Option(
            "--upright/--as-stored",
            help="Turn pictures as their EXIF data say, as transformers does, or leave them, as LLaVA's scripts do.",
        ),
    ] = True,
    workers: Annotated[int, typer.Option(help="Processes that load and prepare pictures; 0 for none.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Weights: auto, float32, bfloat16, float16.")] = "auto",
    attn: Annotated[str | None, typer.Option(help="Attention: eager, sdpa, flash_attention_2, ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: mustdrop-eval/...")] = None,
    method_time: Annotated[
        int,
        typer.Option(
            help="Measure what the method itself takes of the time to the first token, with this many questions, one "
            "by one, after the run. In the folder of a run that is done, this alone is added."
        ),
    ] = 0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Ask again what failed before.")] = False,
    max_failed: Annotated[float, typer.Option(help="Share of questions that may fail.", min=0.0, max=1.0)] = 0.01,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result file instead of a table.")] = False,
) -> None:
    """Score a model on a benchmark, with pruning or without, in the formats of LLaVA's evaluation guide.

    With several methods or budgets, every method runs at every budget, the model is loaded once, and a table puts the
    runs side by side. A run that a method refuses is named, and the others go on.

    Writes answers for the original scorer and result.json into the folder of the run. Give the same command again after
    an interruption: it goes on where it stopped. `accelerate launch --multi_gpu --num_processes 2 -m mustdrop eval ...`
    shares the questions among several processes.

    Exit codes: 0 done; 1 done, but more than --max-failed of the questions failed; 2 wrong settings, or a missing file.

    Examples:
        python -m mustdrop eval scenes --method mustdrop --keep 192

        python -m mustdrop eval scenes --method none --method random --method mustdrop --keep 192 --keep 64

        python -m mustdrop eval mme --model llava-hf/llava-1.5-7b-hf --keep 192 --data playground/data/eval

        python -m mustdrop eval mme --model llava-hf/llava-1.5-7b-hf --sparse --scale 13.5 --bias 0.0

        python -m mustdrop eval textvqa --model llava-hf/llava-1.5-7b-hf --global-thr 0.011 --individual-thr 0.01

        python -m mustdrop eval pope --dataset lmms-lab/POPE --model llava-hf/llava-1.5-7b-hf --method none
    """
    from transformers.utils import logging

    from mustdrop.cli.common import check_folder

    logging.disable_progress_bar()  # there is one of our own
    methods, budgets = method or ["none" if sparse is False else "mustdrop"], _budgets(keep or [])
    if sparse is False and set(methods) != {"none"}:
        shown = ", ".join(methods)
        raise ConfigError(f"--no-sparse runs the unpruned model, and --method {shown} prunes it: give one of them.")
    if sparse and "none" in methods:
        raise ConfigError("--sparse prunes, and --method none does not: give one of them.")
    named = {"scale": scale, "bias": bias, "global_threshold": global_thr, "individual_threshold": individual_thr}
    several = len(methods) > 1 or len(budgets) > 1
    knobs = {} if several or not budgets else {"keep": budgets[0]}
    knobs |= {name: number for name, number in named.items() if number is not None}
    settings = Settings(
        benchmark=benchmark,
        model=model,
        method=methods[0],
        knobs=knobs | dict(_pair(text) for text in knob or []),
        out=out,
        data=data,
        dataset=dataset,
        split=split,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        workers=workers,
        frames=frames,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        total_pixels=total_pixels,
        coordinates=coordinates,
        template=template,
        device=device,
        dtype=dtype,
        attention=attn,
        max_new_tokens=max_new_tokens,
        retry_failed=retry_failed,
        upright=upright,
        method_time=method_time,
    )
    if several:
        ok = _several(settings, methods, budgets, max_failed, as_json)
        if not ok:
            raise typer.Exit(FAILED)
        return
    check_folder(settings.folder)
    bar = Bar()
    try:
        result = evaluate(settings, bar)
    except KeyboardInterrupt:
        bar.end()
        kept = f"Interrupted. The answers so far are in {settings.folder}: the same command goes on."
        notes.print(kept, markup=False, highlight=False, soft_wrap=True)
        raise
    finally:
        bar.end()
    if result is None:  # another process shows it
        return
    if as_json:
        typer.echo(result.model_dump_json(indent=1))
    else:
        console.print(table(result))
        console.print(f"Wrote {settings.folder / RESULT} and {', '.join(result.answers)} beside it.", soft_wrap=True)
    if not acceptable(result, max_failed):
        raise typer.Exit(FAILED)


def _budgets(texts: Sequence[str]) -> list[Any]:
    """`--keep` as it was given, each once."""
    from mustdrop.cli.common import budget

    found = [budget(part) for text in texts for part in text.split(",") if part]
    return list(dict.fromkeys(found))


def _several(settings: Settings, methods: list[str], budgets: list[Any], max_failed: float, as_json: bool) -> bool:
    """Every method at every budget, and a table of all; whether each ran and little enough failed."""
    from mustdrop.eval.engine import load
    from mustdrop.eval.sweep import runs, sweep

    wanted = runs(settings, methods, budgets)
    good, results = True, []
    bars: list[Bar] = []

    def one(run: Settings, loaded: tuple[Any, Any]) -> EvalResult | None:
        bars.append(Bar())
        try:
            return evaluate(run, bars[-1], loaded)
        finally:
            bars[-1].end()

    for outcome in sweep(wanted, lambda run: load(run.model, run.dtype, run.attention), one):
        name, knobs = outcome.settings.described
        if outcome.refused is not None:
            good = False
            told = " ".join([name, *(f"{knob}={setting}" for knob, setting in knobs.items())])
            notes.print(f"{told}: cannot: {outcome.refused}", markup=False, highlight=False, soft_wrap=True)
        elif outcome.result is not None:
            results.append((outcome.settings.folder, outcome.result))
            good &= acceptable(outcome.result, max_failed)
    if as_json:
        typer.echo(json.dumps([result.model_dump(mode="json") for _, result in results], indent=1))
    elif results:
        print_groups(results)
    return good


def _pair(text: str) -> tuple[str, Any]:
    name, sign, content = text.partition("=")
    if not sign or not name:
        raise typer.BadParameter(f"--knob {text!r}: write NAME=VALUE, e.g. window=2.")
    return name, value(content)


def value(text: str) -> Any:
    """A number where the text is one (25% is 0.25); a tuple for "2,6,10"; true, false and none; else the text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if "," in text:
        return tuple(value(part) for part in text.split(",") if part)
    try:
        return parse_keep(text)
    except BudgetError:
        return text
