"""`mustdrop bench`: how much faster a model becomes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mustdrop.budget import keep_text
from mustdrop.cli.common import budget, check_run, console, load_subject, print_json, write_json

if TYPE_CHECKING:
    from PIL import Image

BUDGETS = ["192", "64"]
SIDE = 672  # pixels of the scene that stands in for an image
QUESTION = "Describe the image in detail."


def bench(
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a model; default: the bundled one.")] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Budget in tokens (64) or as a share (0.25); may be given several times.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method; may be given several times.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Image file; default: a drawn scene.", exists=True, dir_okay=False)
    ] = None,
    question: Annotated[str, typer.Option(help="What is asked about it.")] = QUESTION,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the answer.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs per setting, after two to warm up.")] = 7,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: a GPU if any.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights of --model: auto, float32, bfloat16, float16.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    """Measure what pruning saves with a model of yours on this machine: prefill, decoding, memory.

    Plain and patched model run in turns, and every ratio is one of neighbours. Speed depends on sizes and hardware,
    not on what is in the image. The benchmarks behind the figures of the documentation are in the repository.

    Examples:
        python -m mustdrop bench

        python -m mustdrop bench --model llava-hf/llava-1.5-7b-hf --keep 192 --keep 64 --out bench.json

        python -m mustdrop bench --model Qwen/Qwen2.5-VL-7B-Instruct --keep 0.25 --image page.png --batch 4
    """
    from transformers.utils import logging

    from mustdrop.bench import Setting, benchmark
    from mustdrop.clock import WARM_UP
    from mustdrop.loading import check_question

    methods, budgets = method or ["mustdrop"], [budget(text) for text in keep or BUDGETS]
    check_run(methods, budgets, device, dtype)
    logging.disable_progress_bar()
    settings = [Setting(name, number) for name in methods for number in budgets]
    picture = _picture(image)
    subject, processor = load_subject(model, device, dtype)
    check_question(processor, question)
    inputs = _inputs(subject, processor, picture, question, batch)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(settings) * (rounds + WARM_UP))
        result = benchmark(
            subject,
            inputs,
            settings,
            rounds=rounds,
            new_tokens=new_tokens,
            advance=lambda: progress.update(task, advance=1),
        )
    result["model"] = {"name": model or "bundled"} | result["model"]
    if out is not None:
        write_json(out, result)
    if json:
        print_json(result)
        return
    _print(result)
    if out is not None:
        console.print(f"Wrote {out}.", markup=False)


def _picture(image: Path | None) -> Image.Image:
    from PIL import Image

    from mustdrop.demo.scenes import SceneMaker
    from mustdrop.pictures import read_picture

    if image is not None:
        return read_picture(image)
    return Image.fromarray(SceneMaker("heldout", 0).scene().image).resize((SIDE, SIDE))


def _inputs(model: Any, processor: Any, picture: Image.Image, question: str, batch: int) -> Any:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text] * batch, images=[[picture]] * batch, return_tensors="pt", padding=True)
    return inputs.to(model.device, model.dtype)


def _print(result: dict[str, Any]) -> None:
    model, prompt = result["model"], result["prompt"]
    console.print(
        f"{model['name']} ({model['architecture']}, {model['parameters'] / 1e9:.3g} B parameters, {model['dtype']}) on "
        f"{model['device']}, {result['hardware']}; {prompt['batch']} prompts of {prompt['tokens']} tokens, "
        f"{prompt['new_tokens']} new ones; medians (and extremes) of {result['rounds']} pairs.",
        markup=False,
        highlight=False,
    )
    table = Table("setting", "tokens per layer", "FLOPs", "KV", "prefill", "decoding", "peak memory")
    for row in result["rows"]:
        equal = sum(row["equal_tokens"]) / len(row["equal_tokens"])
        peak = row["peak_bytes"]
        table.add_row(
            row["method"] if row["keep"] is None else f"{row['method']} keep={keep_text(row['keep'])}",
            f"{equal:.1f} of {row['vision_tokens'][0]}",
            f"{row['flops_ratio']:.0%}",
            f"{row['kv_ratio']:.0%}",
            _speed(row["prefill_speed_up"], row["prefill_ms"]),
            _speed(row["decode_speed_up"], row["decode_ms"]),
            f"{peak['patched'] / peak['plain']:.0%}" if peak else "not counted here",
        )
    console.print(table, markup=False)


def _speed(ratio: dict[str, float], times: dict[str, float]) -> str:
    return (
        f"{ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})\n"
        f"{times['plain']:.1f} to {times['patched']:.1f} ms"
    )
