"""The bundled Qwen3-VL: its letters, its training, its checkpoint folder and its accuracy.

python -m benchmarks page_model train --work WORK     # from nothing; started again, it goes on where it was
python -m benchmarks page_model export --work WORK    # what is trained so far, as a Hugging Face folder
python -m benchmarks page_model evaluate              # held-out accuracy of the bundled folder
python -m benchmarks page_model letters --fonts DIR   # the bundled letters, from font files
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent

# Freed memory is kept for the next step instead of being returned to the system (page faults took a third of
# the time), and idle threads sleep, for the cores may be shared.  A process reads both only when it starts.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    commands = parser.add_subparsers(dest="what", required=True)
    letters = commands.add_parser("letters", help="write the bundled letters and their split")
    letters.add_argument("--fonts", type=Path, required=True, help="a folder that holds the font files")
    train = commands.add_parser("train", help="train, or go on training")
    train.add_argument("--work", type=Path, required=True, help="where the state of the run is kept")
    train.add_argument("--log", type=Path, help="default: train_log.jsonl in the work folder")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--threads", type=int, default=2)
    train.add_argument("--minutes", type=float, default=1e9, help="stop after so long; start again to go on")
    train.add_argument("--steps", type=int, help="steps of the last stage, in the end of which the rate comes down")
    export = commands.add_parser("export", help="write the checkpoint folder")
    export.add_argument("--work", type=Path, required=True)
    export.add_argument("--out", type=Path, help="default: the bundled folder")
    evaluate = commands.add_parser("evaluate", help="measure the bundled model")
    evaluate.add_argument("--split", default="heldout", help="anything but heldout is printed only")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--questions", type=int, default=400, help="of each kind, at least")
    evaluate.add_argument("--threads", type=int, default=2)


def run(options: argparse.Namespace) -> int:
    """One of the commands."""
    if options.what == "letters":
        import mustdrop.demo.lettering
        from benchmarks.page_model.glyphs import write_letters

        print(write_letters(Path(mustdrop.demo.lettering.__file__).with_name("letters.npz"), options.fonts))
    elif options.what == "train":
        _train(options)
    elif options.what == "export":
        from benchmarks.page_model.export import save
        from benchmarks.page_model.training import Log, Training
        from mustdrop.demo.model import PAGE_CHECKPOINT

        training = Training(options.work, Log(Path(os.devnull)), 0)
        training.use_mean()
        save(training.model, options.out or PAGE_CHECKPOINT)
    else:
        from benchmarks.page_model.evaluate import evaluate

        evaluate(options.split, options.seed, options.questions, options.threads)
    return 0


def _train(options: argparse.Namespace) -> None:
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.environ.update(ENVIRONMENT)
        os.execv(sys.executable, sys.orig_argv)
    import torch

    from benchmarks.page_model.training import STEPS, Log, Training

    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    log = Log(options.log or options.work / "train_log.jsonl")
    training = Training(options.work, log, options.seed)
    steps = {**STEPS, "language": options.steps or STEPS["language"]}
    where = {"stage": training.stage, "step": training.step}
    log.environment(seed=options.seed, threads=options.threads, steps=steps, resumed_at=where)
    done = training.run(steps, 60 * options.minutes)
    selection = {}
    if done:
        training.use_mean()
        selection = training.check()
    log.write(event="end", done=done, stage=training.stage, step=training.step, selection=selection)
