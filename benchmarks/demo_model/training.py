"""The training loop, and the log that is published with the model."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn

Metrics = dict[str, float]
Step = Callable[[], tuple[Tensor, Metrics]]


class Log:
    """Writes one JSON object per line, and prints it."""

    def __init__(self, path: Path, resume: bool) -> None:
        self._path = path
        if not resume:
            path.unlink(missing_ok=True)

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
        self.write(
            event="start",
            versions=versions,
            threads=torch.get_num_threads(),
            host_cores=os.cpu_count(),
            **settings,
        )


def fit(
    name: str,
    parameters: list[nn.Parameter],
    step: Step,
    *,
    steps: int,
    rate: float,
    cosine: tuple[float, float],
    log: Log,
    every: int = 50,
) -> None:
    """AdamW with a short warm-up, then the given part (0-1) of one cosine from `rate` down to 2 % of it.

    A stage that ends before its cosine does hands over while its learning rate is still high.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    wall = time.time()
    seen: dict[str, list[float]] = defaultdict(list)
    start, end = cosine
    for number in range(1, steps + 1):
        progress = start + (end - start) * number / steps
        share = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate * share * min(1.0, number / 30)
        loss, metrics = step()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for key, value in {"loss": loss.item(), **metrics}.items():
            seen[key].append(value)
        if number % every == 0 or number == steps:
            means = {key: round(float(np.mean(values)), 4) for key, values in sorted(seen.items())}
            log.write(event="train", stage=name, step=number, wall_s=round(time.time() - wall), **means)
            seen.clear()
