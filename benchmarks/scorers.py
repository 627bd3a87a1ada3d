"""The scorers that are bundled with the bundled models: `mustdrop.fitting` on samples that the models were trained on.

    python -m benchmarks scorers fit --model pages --work WORK              # a scorer that does not read the question
    python -m benchmarks scorers fit --model pages --work WORK --question   # one that does
    python -m benchmarks scorers export --work WORK                         # the better of both goes into the package

`fit` goes on where it was cut off. `export` compares by the divergence on the held-out part of the training samples,
and writes benchmarks/results/scorers.json with the settings and the log of every fit. Neither looks at samples of the
selection split or of the held-out one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.common import RESULTS, save, significant
from mustdrop.demo.model import CHECKPOINT, PAGE_CHECKPOINT, load, prompt
from mustdrop.demo.scenes import SceneMaker
from mustdrop.demo.tasks import LEARNED, TaskMaker
from mustdrop.demo.tasks.clip import FPS
from mustdrop.provenance import provenance
from mustdrop.pruners.scored import FOLDER
from mustdrop.pruners.scorer import CONFIG, WEIGHTS

SPLIT = "train"
#: Of the samples: a seed of no benchmark, nor of the models' own training; how many pictures, or samples per kind.
SEED, NUMBER = 8001, {"scenes": 120, "pages": 60}
SETTINGS: dict[str, dict[str, Any]] = {
    "scenes": {"steps": 120, "batch": 4, "every": 20, "most_held_out": 16, "max_new_tokens": 16},
    "pages": {"steps": 200, "batch": 8, "every": 25, "most_held_out": 32, "max_new_tokens": 16},
}
HOMES = {"scenes": CHECKPOINT, "pages": PAGE_CHECKPOINT}

Sample = tuple[str, Callable[[], dict[str, Any]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    commands = parser.add_subparsers(dest="what", required=True)
    fit = commands.add_parser("fit", help="train a scorer for a bundled model, or go on training it")
    fit.add_argument("--model", choices=tuple(NUMBER), required=True)
    fit.add_argument("--work", type=Path, required=True, help="where the folders of the fits are")
    fit.add_argument("--question", action="store_true", help="the scorer reads the question")
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--threads", type=int, default=1)
    export = commands.add_parser("export", help="put the better scorer of each model into the package")
    export.add_argument("--work", type=Path, required=True)


def run(options: argparse.Namespace) -> int:
    """One of the commands."""
    if options.what == "export":
        export(options.work)
    else:
        torch.set_num_threads(options.threads)
        fit(options.model, options.work, options.question, options.seed)
    return 0


def fit(name: str, work: Path, question: bool, seed: int) -> None:
    """Train one scorer."""
    from mustdrop import fitting

    model, processor = load(name)
    named = list(scenes(processor) if name == "scenes" else samples(processor))
    start, used, folder = time.perf_counter(), time.process_time(), work / f"{name}{'-question' if question else ''}"
    came_from = provenance(seed)  # of the code that is loaded now
    about = {"bundled_model": name, "split": SPLIT, "samples_seed": SEED, **came_from}

    def show(look: fitting.Look) -> None:
        loss = "" if look.loss is None else f"{look.loss:.4f}"
        print(f"{name} {look.step}/{look.steps}: loss {loss}, held {look.held:.4f}, best {look.best:.4f}", flush=True)

    fitted = fitting.fit(
        model,
        [sample for _, sample in named],
        folder,
        names=[called for called, _ in named],
        about=about,
        on_step=show,
        question=question,
        seed=seed,
        **SETTINGS[name],
    )
    minutes = {
        "wall_minutes": (time.perf_counter() - start) / 60,
        "cpu_minutes": (time.process_time() - used) / 60,
    }
    row = {
        "model": name,
        "question": question,
        "split": SPLIT,
        "samples_seed": SEED,
        "samples": len(named),
        "settings": fitting.FitSettings(**SETTINGS[name], question=question, seed=seed).to_dict(),
        "weights": sum(weight.numel() for weight in fitted.scorer.parameters()),
        "held_before": fitted.before,
        "held": significant(fitted.held),
        "step": fitted.step,
        "ended": fitted.ended,
        "skipped": fitted.skipped,
        "minutes": {part: significant(value, 3) for part, value in minutes.items()},
        "coverage": fitted.scorer.coverage,
        "covered": fitted.covered,
        "log": fitted.log,
        **came_from,
    }
    _add_earlier(row, folder / "row.json")
    (folder / "row.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def _add_earlier(row: dict[str, Any], path: Path) -> None:
    """Of a fit that was gone on with: the minutes of both runs, and the commit that trained the weights."""
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    spent = before.get("minutes") or before["last_run"]
    row["minutes"] = {part: significant(value + spent[part], 3) for part, value in row["minutes"].items()}
    row["coverage_commit"] = row["commit"]
    row |= {name: before[name] for name in ("commit", "dirty", "date")}


def scenes(processor: Any) -> Iterator[Sample]:
    """Training scenes, a question of each type about each."""
    maker = SceneMaker(SPLIT, SEED)
    for number in range(NUMBER["scenes"]):
        scene = maker.scene()
        for asked in maker.questions(scene):
            picture, text = Image.fromarray(scene.image), prompt(processor, asked.text)
            yield (
                f"scene {number}, {asked.type}",
                lambda picture=picture, text=text: dict(processor(text=text, images=picture, return_tensors="pt")),
            )


def samples(processor: Any) -> Iterator[Sample]:
    """Training samples of each kind, a question of each type that the model has learned."""
    for kind, types in LEARNED.items():
        maker = TaskMaker(kind, SPLIT, SEED)
        for number in range(NUMBER["pages"]):
            sample = maker.sample()
            videos = int(sample.video)
            media: dict[str, Any] = {"videos" if videos else "images": [list(sample.pictures)]}
            for asked in maker.questions(sample):
                if asked.type in types:
                    text = prompt(processor, asked.text, 0 if videos else len(sample.pictures), videos)
                    yield (
                        f"{kind} {number}, {asked.type}",
                        lambda text=text, media=media: dict(processor(text=[text], fps=FPS, **media)),
                    )


def export(work: Path) -> None:
    """Put the better scorer of each model beside its weights, and write what all fits were."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*/row.json"))]
    for name, home in HOMES.items():
        own = [row for row in rows if row["model"] == name]
        if not own:
            continue
        best = min(own, key=lambda row: sum(row["covered"][f"{row['coverage']:g}"]))
        for row in own:
            row["bundled"] = row is best
        source = work / f"{name}{'-question' if best['question'] else ''}"
        (home / FOLDER).mkdir(exist_ok=True)
        for part in (CONFIG, WEIGHTS):
            shutil.copy(source / part, home / FOLDER / part)
        print(f"{name}: {source} -> {home / FOLDER}")
    save(RESULTS / "scorers.json", {**provenance(0), "rows": rows})
