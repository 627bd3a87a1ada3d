"""The stages of training, the optimizer, and a loop that can be cut off at any step."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks.page_model import lessons
from benchmarks.page_model.network import build
from mustdrop.demo.tasks import KINDS

#: Steps of each stage, in the order in which they run.  The last one may be trained for longer at any time.
STEPS = {"glyphs": 400, "windows": 450, "language": 4800}
MATRIX_RATE, OTHER_RATE = 0.03, 2e-3
DECAY = 0.4  # of the last stage's steps, in the end, over which the rate comes down to nothing
AVERAGE = 0.998  # the weights that are published are a running mean over some hundred steps
# Weight of the words that vision tokens are asked for, while answers are trained: up to a step, and from there on.
NAMING_UNTIL, NAMING = 600, (1.0, 0.3)

#: The share of each kind of sample, and the most vision tokens of a picture, from a step of the last stage on.
CURRICULUM = (
    (0, {"scenes": 0.4, "pages": 0.4, "grounding": 0.2}, 36),
    (250, {"scenes": 0.25, "pages": 0.3, "grounding": 0.15, "videos": 0.15, "changes": 0.15}, 42),
    (700, {"scenes": 0.2, "pages": 0.35, "grounding": 0.15, "videos": 0.15, "changes": 0.15}, 64),
    (1200, {"scenes": 0.2, "pages": 0.35, "grounding": 0.15, "videos": 0.15, "changes": 0.15}, 100),
    (3000, {"scenes": 0.12, "pages": 0.42, "grounding": 0.1, "videos": 0.2, "changes": 0.16}, 150),
)  # fmt: skip
# Weight of the attention of words to what they name, likewise.
BEFORE = 0.5  # of the characters before vision tokens
POINTING_UNTIL, POINTING = 1500, (0.5, 0.15)


class Log:
    """Writes one JSON object per line, and prints it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **entry: object) -> None:
        line = json.dumps(entry)
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def environment(self, **settings: object) -> None:
        """Versions and settings: whatever a reader needs to judge or repeat the run."""
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        }
        self.write(event="start", versions=versions, host_cores=os.cpu_count(), **settings)


class Training:
    """One run: weights, their running mean, optimizers, and how far it is."""

    def __init__(self, work: Path, log: Log, seed: int) -> None:
        self.work, self.log, self.seed = work, log, seed
        torch.manual_seed(seed)
        self.model, self.naming, self.pointing = build(), lessons.Naming(), lessons.Pointing()
        named = [*self.model.named_parameters(), *self.naming.named_parameters()]
        matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
        others = [weight for name, weight in named if weight.ndim != 2 or "embed" in name]
        self.weights = [*matrices, *others]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.02, momentum=0.9),
            torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.mean = [weight.detach().clone() for weight in self.weights]
        self.stage, self.step = 0, 0
        if self._file.exists():
            self._load()

    @property
    def _file(self) -> Path:
        return self.work / "state.pt"

    def save(self) -> None:
        """Everything that is needed to go on, written in one piece."""
        part = self._file.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "naming": self.naming.state_dict(),
                "mean": self.mean,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "stage": self.stage,
                "step": self.step,
            },
            part,
        )
        part.replace(self._file)

    def _load(self) -> None:
        state = torch.load(self._file)
        self.model.load_state_dict(state["model"])
        self.naming.load_state_dict(state["naming"])
        self.mean = state["mean"]
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.stage, self.step = state["stage"], state["step"]

    @torch.no_grad()
    def use_mean(self) -> None:
        """Puts the running mean into the model, for measuring or publishing; the run itself has to be loaded anew."""
        for weight, mean in zip(self.weights, self.mean, strict=True):
            weight.copy_(mean)

    def run(self, steps: dict[str, int], seconds: float, every: int = 25, save_every: float = 180.0) -> bool:
        """Trains until all stages are done (True) or the time is up (False)."""
        start = saved = time.time()
        stopped: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        seen: dict[str, list[float]] = {}
        wall, cpu = time.time(), time.process_time()
        while self.stage < len(steps):
            name, total = list(steps.items())[self.stage]
            if self.step >= total:
                self.stage, self.step = self.stage + 1, 0
                self.save()
                continue
            for key, values in self._step(name, total).items():
                seen.setdefault(key, []).extend(values)
            self.step += 1
            if self.step % every == 0 or self.step == total:
                means = {key: round(float(np.mean(values)), 3) for key, values in sorted(seen.items())}
                used = {"wall_s": round(time.time() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
                self.log.write(event="train", stage=name, step=self.step, **used, **means)
                seen.clear()
                wall, cpu = time.time(), time.process_time()
            if time.time() - saved > save_every:
                self.save()
                saved = time.time()
            if stopped or time.time() - start > seconds:
                self.save()
                return False
        return True

    def _step(self, name: str, total: int) -> dict[str, list[float]]:
        """One step of a stage.  It depends on the weights, the seed, the stage and its number, and nothing else."""
        seed = (self.seed * 10 + self.stage) * 1_000_000 + self.step
        share = min(1.0, (self.step + 1) / 25) * min(1.0, 0.02 + (total - self.step) / (DECAY * total))
        if name != "language":
            share = min(1.0, (self.step + 1) / 25)
        for optimizer, rate in zip(self.optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
        with torch.autocast("cpu", torch.bfloat16):  # matrix products only: the weights stay in single precision
            metrics = self._look(name, seed) if name != "language" else self._talk(seed)
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average = min(AVERAGE, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, [weight.detach() for weight in self.weights], 1 - average)
        return metrics

    @property
    def _words(self) -> Tensor:
        return self.model.model.language_model.embed_tokens.weight

    def _look(self, name: str, seed: int) -> dict[str, list[float]]:
        """Vision tokens are asked for words: what they show, in which ink, where."""
        number, side = {"glyphs": (256, lessons.UNIT), "windows": (144, 2 * lessons.UNIT)}[name]
        samples = lessons.windows(seed, number, side)
        features, deep, grid = lessons.see(self.model, samples)
        target = lessons.labels(samples, grid)
        loss, metrics = self.naming(features, self._words, target, places=name != "glyphs")
        (loss + 0.0 * sum(level.sum() for level in deep)).backward()
        return {"loss": [loss.item()], **{key: [value] for key, value in metrics.items()}}

    def _talk(self, seed: int) -> dict[str, list[float]]:
        """Two batches, as a rule of different kinds: answers, and words for vision tokens beside."""
        _, shares, area = [row for row in CURRICULUM if row[0] <= self.step][-1]
        rng = np.random.default_rng((seed, 9))
        kinds = rng.choice(list(shares), 2, replace=False, p=list(shares.values()))
        found: dict[str, list[float]] = {}
        for number, kind in enumerate(str(kind) for kind in kinds):
            batch = lessons.draw(kind, "train", 2 * seed + number, tokens=900, questions=8, area=area, moments=None)
            features, deep, grid = lessons.see(self.model, batch.samples)
            target = lessons.labels(batch.samples, grid)
            named, metrics = self.naming(features, self._words, target)
            logits, shares, states, prefix = lessons.answer(self.model, batch, features, deep, grid)
            before, related = self.naming.before(states, self._words, target["before"].reshape(len(states), -1))
            metrics |= related
            pointed = self.pointing(batch, shares, prefix, target)
            loss = F.cross_entropy(logits.float().flatten(0, 2), batch.target.flatten(), ignore_index=lessons.IGNORE)
            beside = NAMING[self.step >= NAMING_UNTIL] * named + POINTING[self.step >= POINTING_UNTIL] * pointed
            beside = beside + BEFORE * before
            ((loss + beside) / 2).backward()
            right = lessons.by_type(lessons.exact(logits.detach(), batch.target), batch.types)
            for key, values in right.items():
                found.setdefault(f"{kind}.{key}", []).extend(values)
            found.setdefault("loss", []).append(loss.item())
            found.setdefault("pointing", []).append(pointed.item())
            for key, value in metrics.items():
                found.setdefault(key, []).append(value)
        return found

    @torch.no_grad()
    def check(self, split: str = "selection", batches: int = 3, area: int = 150) -> dict[str, dict[str, float]]:
        """Exact match by kind and type on samples of a split, by the weights that are in the model now."""
        table = {}
        for kind in KINDS:
            found: dict[str, list[float]] = {}
            for number in range(batches):
                batch = lessons.draw(kind, split, number, tokens=1500, questions=12, area=area, moments=None)
                features, deep, grid = lessons.see(self.model, batch.samples)
                logits, *_ = lessons.answer(self.model, batch, features, deep, grid)
                for key, values in lessons.by_type(lessons.exact(logits, batch.target), batch.types).items():
                    found.setdefault(key, []).extend(values)
            table[kind] = {key: round(float(np.mean(values)), 3) for key, values in sorted(found.items())}
        return table
