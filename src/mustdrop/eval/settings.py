"""The settings of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mustdrop.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Everything that can be said on the command line.

    Attributes:
        benchmark: name of the benchmark.
        model: hub id or folder; None is the bundled model.
        method: name of the method.
        knobs: its settings.
        out: folder of the run; None makes a name.
        data: folder of the files; None is the guide's.
        dataset: data set of `datasets` in place of files.
        split: split of the benchmark.
        batch_size: rows of a call.
        limit: questions to ask at most.
        seed: of the choice that `limit` makes; None takes the first.
        workers: processes that load.
        frames: frames of a video.
        template: "auto", "vicuna_v1" or "processor".
        device: "auto" or a device of torch.
        dtype: "auto", "float32", "bfloat16" or "float16".
        attention: attention implementation; None leaves the choice to transformers.
        max_new_tokens: limit of an answer; None is the benchmark's.
        retry_failed: ask again what failed.
        upright: turn pictures as their EXIF data say.
    """

    benchmark: str
    model: str | None = None
    method: str = "mustdrop"
    knobs: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None
    data: Path | None = None
    dataset: str | None = None
    split: str | None = None
    batch_size: int = 8
    limit: int | None = None
    seed: int | None = None
    workers: int = 2
    frames: int = 8
    template: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    attention: str | None = None
    max_new_tokens: int | None = None
    retry_failed: bool = False
    upright: bool = True

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        if self.out is not None:
            return self.out
        model = "bundled" if self.model is None else Path(self.model).name
        knobs = "".join(f"-{key}={value}" if key != "keep" else f"-{value}" for key, value in self.knobs.items())
        return Path("mustdrop-eval") / self.benchmark / model / f"{self.method}{knobs}"

    def check(self, processes: int) -> None:
        """Refuse what cannot be meant.

        Args:
            processes: how many share the questions.

        Raises:
            ConfigError: settings out of range, or that contradict each other.
        """
        if self.data is not None and self.dataset is not None:
            raise ConfigError("--data and --dataset are two places for the same questions: give one.")
        if self.retry_failed and processes > 1:
            raise ConfigError("--retry-failed works in one process: others could not tell old failures from new ones.")
        for name in ("batch_size", "frames", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')}={value} must be at least 1.")
        if self.workers < 0:
            raise ConfigError(f"--workers={self.workers} must be at least 0.")
