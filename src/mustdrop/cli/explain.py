"""`mustdrop explain`: a page on which one can follow, layer by layer, what methods keep of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from mustdrop.budget import Keep
from mustdrop.cli.common import budget, check_run, console, load_subject
from mustdrop.errors import ConfigError

if TYPE_CHECKING:
    from mustdrop.explain import Prompt

QUESTION = "where is the magenta one ?"  # about the bundled scene
SCENE = 7


def explain(
    image: Annotated[list[Path] | None, typer.Option(help="Image file; several for one prompt.")] = None,
    video: Annotated[Path | None, typer.Option(help="Video file, or a folder of its frames.")] = None,
    question: Annotated[str | None, typer.Option(help="What is asked.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method; several stand side by side.")] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Budget in tokens (64) or as a share (0.25); several are all tried. Default: the method's."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a model; default: the bundled one.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames that are taken of a video.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: a GPU if any.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights of --model: auto, float32, bfloat16, float16.")] = "auto",
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("kept.html"),
) -> None:
    """Write a page on which one can follow, layer by layer, which patches survive.

    The page is one file that any browser shows without a network: the pictures with the patches that are left at each
    layer, merged groups, the attention of the words where it was read, tokens, FLOPs and cache. It holds the pictures.

    Examples:
        python -m mustdrop explain

        python -m mustdrop explain --image cat.png --question "What is it?" --method mustdrop --method fastv --keep 64

        python -m mustdrop explain --model Qwen/Qwen2.5-VL-7B-Instruct --video walk.mp4 --question "Who is there?"
    """
    from transformers.utils import logging

    from mustdrop.trace_page import write

    methods, budgets = method or ["mustdrop"], [budget(text) for text in keep or []]
    check_run(methods, budgets, device, dtype)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: give the name of a file to write, e.g. {out / 'kept.html'}.")
    prompt = _prompt(image or [], video, question, model, frames)
    logging.disable_progress_bar()
    subject, processor = load_subject(model, device, dtype)
    wanted: list[Keep | None] = [*budgets] or [None]
    settings = [(name, number) for name in methods for number in wanted]
    steps = iter(track(range(len(settings)), "asking", console=Console(stderr=True), transient=True))
    next(steps)

    from mustdrop.explain import compare

    runs = compare(subject, processor, prompt, settings, new_tokens=new_tokens, advance=lambda: next(steps, None))
    write(out, prompt.media, runs, question=prompt.question)
    for run in runs:
        console.print(f"{run.name}: {run.answer}", markup=False, highlight=False)
    console.print(f"Wrote {out}: open it in a browser.", markup=False, highlight=False)


def _prompt(images: list[Path], video: Path | None, question: str | None, model: str | None, frames: int) -> Prompt:
    """The prompt, read and checked before a model is loaded."""
    from mustdrop.explain import Prompt
    from mustdrop.pictures import read_picture

    if images and video is not None:
        raise ConfigError("give --image or --video, not both: a page shows the pictures of one prompt.")
    if (images or video is not None) and not question:
        raise ConfigError("--image and --video need --question TEXT: only for the bundled scene one is known.")
    if video is not None:
        return Prompt(question or "", video=_frames(video, frames))
    if images:
        return Prompt(question or "", [read_picture(path) for path in images])
    if model is not None:
        raise ConfigError("--model needs --image FILE or --video FILE, and --question TEXT.")
    return Prompt(question or QUESTION, [_scene()])


def _frames(video: Path, frames: int) -> Any:
    from mustdrop.eval.media import Clip, MediaError

    try:
        return Clip(video, frames).load()
    except MediaError as error:
        raise ConfigError(f"--video {video}: {error}") from None


def _scene() -> Any:
    from PIL import Image

    from mustdrop.demo.scenes import SceneMaker

    return Image.fromarray(SceneMaker("heldout", seed=SCENE).scene().image)
