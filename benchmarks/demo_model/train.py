"""Trains the demo model from nothing, on a CPU.

    python benchmarks/demo_model/train.py digits    # the bundled digit images
    python benchmarks/demo_model/train.py model --out src/mustdrop/demo/checkpoint    # everything else

Every stage is seeded on its own and starts from the weights that the stage before saved in `--work`.  A stage
whose weights are already there is not run again: an interrupted run continues there, with the same result.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import language
import numpy as np
import torch
import vision
from digits import write_digits
from export import save
from network import PATCHES, WHOLE, build
from training import Log, fit

import mustdrop.demo.scenes

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

BANK = 1600  # training scenes whose frozen features the decoder is trained on

#: Steps of each stage, in the order in which they run.
STEPS = {
    "vision-one": 1700,  # one object in 4 x 4 patches
    "vision-packed": 1100,  # three to eight objects in 12 x 12 patches
    "vision-whole": 250,
    "language-1-2": 250,  # one or two objects of each scene are visible
    "language-2-4": 800,
    "language-hidden": 700,  # all objects, but only a fifth of the patches
    "language-whole": 420,
}


class Training:
    """One run: the model, the vision read-outs, the stages done so far."""

    def __init__(self, work: Path, log: Log, seed: int, scale: float) -> None:
        self._work, self._log, self._seed, self._scale = work, log, seed, scale
        torch.manual_seed(seed)
        self.model, self.heads = build(), vision.Heads()
        self._bank: language.Bank | None = None

    def run(self) -> None:
        for name in STEPS:
            weights = self._work / f"{name}.pt"
            if not weights.exists():
                wall, cpu = time.time(), time.process_time()
                self._stage(name)
                part = weights.with_suffix(".part")
                torch.save({"model": self.model.state_dict(), "heads": self.heads.state_dict()}, part)
                part.replace(weights)
                used = {"wall_s": round(time.time() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
                self._log.write(event="stage", stage=name, steps=self._steps(name), **used, selection=self._check(name))
            state = torch.load(weights)
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])

    def _steps(self, name: str) -> int:
        return max(2, round(self._scale * STEPS[name]))

    def _stage(self, name: str) -> None:
        number = list(STEPS).index(name)
        torch.manual_seed(1000 * self._seed + number)
        rng = np.random.default_rng((self._seed, number))
        (self._train_vision if name.startswith("vision") else self._train_language)(name, rng)

    def _train_vision(self, name: str, rng: np.random.Generator) -> None:
        tower, heads = self.model.model.vision_tower, self.heads
        windows = vision.WindowMaker(rng)
        scenes = mustdrop.demo.scenes.SceneMaker("train", self._seed)

        def window_step(size: int, number: int) -> Callable:
            def step() -> tuple[torch.Tensor, dict[str, float]]:
                window = windows.window(size)
                data = vision.batch([windows.scene(window) for _ in range(number)], window)
                return vision.loss_and_metrics(tower, heads, data, window)

            return step

        def whole_step() -> tuple[torch.Tensor, dict[str, float]]:
            data = vision.batch([scenes.scene() for _ in range(8)], WHOLE)
            return vision.loss_and_metrics(tower, heads, data)

        step, rate, cosine = {
            "vision-one": (window_step(vision.ONE_OBJECT, 192), 2e-3, (0.0, 0.6)),
            "vision-packed": (window_step(vision.PACKED, 32), 1.4e-3, (0.0, 0.75)),
            "vision-whole": (whole_step, 1e-3, (0.45, 1.0)),
        }[name]
        weights = [*tower.parameters(), *heads.parameters()]
        fit(name, weights, step, steps=self._steps(name), rate=rate, cosine=cosine, log=self._log)

    def _train_language(self, name: str, rng: np.random.Generator) -> None:
        tower = self.model.model.vision_tower.requires_grad_(False)
        if self._bank is None:
            self._bank = language.make_bank(tower, self._seed + 1, max(16, round(self._scale * BANK)))
        if name == "language-1-2":
            language.align(self.model, self.heads, self._seed + 2)
        if name == "language-2-4":
            language.ground(self.model, self._bank, self._log, "kind", head=1, steps=150)
        if name == "language-hidden":
            language.ground(self.model, self._bank, self._log, "region", head=2, steps=150)
        pictures, questions, visible, objects, rate, cosine = {
            "language-1-2": (16, 8, 32, (1, 2), 1.8e-3, (0.0, 0.1)),
            "language-2-4": (12, 10, 64, (2, 4), 1.8e-3, (0.0, 0.3)),
            "language-hidden": (8, 12, 112, (8, 8), 1.5e-3, (0.1, 0.418182)),
            "language-whole": (4, 20, PATCHES, (8, 8), 1e-3, (0.3, 1.0)),
        }[name]
        step = language.make_step(
            self.model,
            self._bank,
            rng,
            pictures=pictures,
            questions=questions,
            visible=visible,
            objects=objects,
        )
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        fit(name, weights, step, steps=self._steps(name), rate=rate, cosine=cosine, log=self._log)

    def _check(self, name: str) -> dict[str, float]:
        if name.startswith("vision"):
            return vision.selection_metrics(self.model.model.vision_tower, self.heads, self._seed)
        return language.selection_accuracy(self.model, self._seed, 320 if name == list(STEPS)[-1] else 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("digits", help="write the bundled digit images and their split")
    run = commands.add_parser("model", help="train, and write the checkpoint folder")
    run.add_argument("--out", type=Path, required=True, help="the checkpoint folder")
    run.add_argument("--work", type=Path, help="where each stage's weights are kept (default: a temporary folder)")
    run.add_argument("--log", type=Path, default=HERE / "train_log.jsonl")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--scale", type=float, default=1.0, help="multiplies all steps; a small one tries the script")
    options = parser.parse_args()

    if options.command == "digits":
        print(write_digits(Path(mustdrop.demo.scenes.__file__).with_name("digits.npz")))
        return
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.environ.update(ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(options.threads)
    work = options.work or Path(tempfile.mkdtemp(prefix="demo_model_"))
    work.mkdir(parents=True, exist_ok=True)
    resume = any(work.glob("*.pt"))
    log = Log(options.log, resume)
    log.environment(resume=resume, seed=options.seed, scale=options.scale, steps=STEPS, bank=BANK)
    training = Training(work, log, options.seed, options.scale)
    training.run()
    save(training.model, options.out)


if __name__ == "__main__":
    main()
