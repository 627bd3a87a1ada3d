"""`mustdrop tune`: pick method and budget from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mustdrop.errors import ConfigError
from mustdrop.extras import need

if TYPE_CHECKING:
    from mustdrop.demo.run import Item, Subject

SCENE_SEED, SCENES = 0, 2  # of the bundled model: scenes for development, not the held-out ones


def command(
    agreement: Annotated[float | None, typer.Option(help="Least share of answer tokens left unchanged: 0.95.")] = None,
    kl: Annotated[float | None, typer.Option(help="Largest divergence from the unpruned model, in nats: 0.05.")] = None,
    time: Annotated[float | None, typer.Option(help="Largest share of the unpruned time for a prompt: 0.5.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a model; default: the bundled one.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help='Lines of {"image": FILE, "question": TEXT}; FILE from this file\'s folder.')
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Image file, in place of --samples.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="Question about it; several times.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Method to try; several times; default: all.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Budget to try: 64, 0.25 or 25%; several times.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens after which an answer is cut off.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: a GPU if any.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights of --model: auto, float32, bfloat16, float16.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for config.json and tune.png.")] = Path("mustdrop-tune"),
) -> None:
    """Pick a method and a budget for a model and a few of your own images and questions.

    Give a floor under quality (--agreement, --kl), a ceiling on time (--time), or both. No right answers are needed:
    quality is fidelity to the unpruned model.

    Examples:
        python -m mustdrop tune --agreement 0.95

        python -m mustdrop tune --model llava-hf/llava-1.5-7b-hf --samples mine.jsonl --kl 0.05 --time 0.6
    """
    from transformers.utils import logging

    from mustdrop.cli.common import budget, check_folder, check_run
    from mustdrop.tuning import KEEPS, Goal, tune

    Goal(agreement, kl, time)  # this and what follows fails before a model is loaded
    keeps = [budget(text) for text in keep or ()] or KEEPS
    need("matplotlib", "viz", "the picture of the search")
    check_run(method or (), (), device, dtype)
    check_folder(out)
    logging.disable_progress_bar()  # there is one of our own
    subject = _subject(model, samples, image, question or [], dtype, device)
    inputs = [subject.inputs(item) for item in subject.items]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("trying", total=None)
        found = tune(
            subject.model,
            inputs,
            agreement=agreement,
            kl=kl,
            time=time,
            methods=method,
            keeps=keeps,
            max_new_tokens=tokens,
            on_step=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console = Console()
    console.print(found.table())
    out.mkdir(parents=True, exist_ok=True)
    found.draw(out / "tune.png")
    found.save(out / "config.json")
    console.print(f"Wrote {out / 'config.json'} and {out / 'tune.png'}. To use it:", markup=False)
    console.print(f'  mustdrop.patch(model, mustdrop.load_config("{out / "config.json"}"))', markup=False)


def _subject(
    model: str | None,
    samples: Path | None,
    image: Path | None,
    questions: list[str],
    dtype: str,
    device: str | None,
) -> Subject:
    """The model and what it is asked."""
    from mustdrop.demo import run
    from mustdrop.loading import place
    from mustdrop.pictures import read_picture

    if samples is not None and (image is not None or questions):
        raise ConfigError("give either --samples FILE or --image FILE with --question TEXT, not both.")
    if (image is None) != (not questions):
        raise ConfigError("--image FILE and --question TEXT come together: each question is about the image.")
    pairs = _pairs(samples) if samples is not None else [(image, text) for text in questions if image is not None]
    items = tuple(run.Item(read_picture(path), text) for path, text in pairs)
    if model is not None:
        if not pairs:
            raise ConfigError("--model needs --samples FILE, or --image FILE and at least one --question TEXT.")
        hub = run.hub_subject(model, pairs[0][0], [pairs[0][1]], dtype, device)
        return run.Subject(hub.name, hub.model, hub.processor, items)
    from mustdrop.demo.model import load

    loaded, processor = load()
    loaded.to(place(device))
    return run.Subject("bundled model", loaded, processor, items or _scenes())


def _pairs(path: Path) -> list[tuple[Path, str]]:
    """Image and question of each line."""
    expected = 'expected lines of {"image": FILE, "question": TEXT}'
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"--samples {path} cannot be read: {error.strerror}.") from error
    out = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            out.append((path.parent / entry["image"], str(entry["question"])))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}, line {number}: {expected}, got {line[:80]!r}.") from error
    if not out:
        raise ConfigError(f"{path} is empty: {expected}.")
    return out


def _scenes() -> tuple[Item, ...]:
    """Scenes for the bundled model, one question of each type about each."""
    from PIL import Image

    from mustdrop.demo.run import Item
    from mustdrop.demo.scenes import SceneMaker

    maker = SceneMaker("selection", SCENE_SEED)
    scenes = [maker.scene() for _ in range(SCENES)]
    pictures = [(Image.fromarray(scene.image), maker.questions(scene)) for scene in scenes]
    return tuple(Item(picture, q.text, q.answer) for picture, questions in pictures for q in questions)
