"""The settings of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mustdrop.errors import ConfigError
from mustdrop.eval.journal import digest
from mustdrop.media_limits import MediaLimits

if TYPE_CHECKING:  # the command line describes its settings without torch
    from mustdrop.registry import MethodLike


@dataclass(frozen=True)
class Settings:
    """Everything that can be said on the command line.

    Attributes:
        benchmark: name of the benchmark.
        model: hub id or folder; None is the bundled model.
        method: a name, an address `module:Class`, a recipe class, or a `Recipe` or `Method` object, which is complete.
        knobs: its settings, where it is a name or a class.
        out: folder of the run; None makes a name.
        data: folder of the files; None is the guide's.
        dataset: data set of `datasets` in place of files.
        split: split of the benchmark.
        batch_size: rows of a call.
        limit: questions to ask at most.
        seed: of the choice that `limit` makes; None takes the first.
        workers: processes that load.
        frames: frames of a video.
        min_pixels: area to which smaller pictures and frames are enlarged; None leaves it to the processor.
        max_pixels: area to which larger ones are shrunk.
        total_pixels: area of all frames of a video together, to which longer ones are shrunk.
        coordinates: of answers about places: "auto", "shares", "thousandths" or "pixels".
        template: "auto", "vicuna_v1" or "processor".
        device: "auto" or a device of torch.
        dtype: "auto", "float32", "bfloat16" or "float16".
        attention: attention implementation; None leaves the choice to transformers.
        max_new_tokens: limit of an answer; None is the benchmark's.
        retry_failed: ask again what failed.
        upright: turn pictures as their EXIF data say.
        method_time: questions of which the time of the method is measured, apart from the run.
    """

    benchmark: str
    model: str | None = None
    method: MethodLike = "mustdrop"
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
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    coordinates: str = "auto"
    template: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    attention: str | None = None
    max_new_tokens: int | None = None
    retry_failed: bool = False
    upright: bool = True
    method_time: int = 0

    def limits(self) -> MediaLimits:
        """What the processor is told about the size of pictures and videos.

        Raises:
            ConfigError: limits that cannot be meant.
        """
        return MediaLimits(self.frames, None, self.min_pixels, self.max_pixels, self.total_pixels)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        from mustdrop.method import Method  # and torch with it: not while the command line starts

        if self.out is not None:
            return self.out
        model = "bundled" if self.model is None else Path(self.model).name
        name, knobs = self.described
        parts = [str(value) if key == "keep" else f"{key}={value}" for key, value in knobs.items()]

        if isinstance(self.method, Method):  # its pruners are too long for a name
            parts = [digest(knobs)[:8]]
        run = re.sub(r"[/\\:\s]", "_", "-".join([name, *parts]))
        return Path("mustdrop-eval") / self.benchmark / model / run

    @property
    def described(self) -> tuple[str, dict[str, Any]]:
        """Name and settings of the method, for tables and files."""
        from mustdrop.registry import described

        return described(self.method, self.knobs)

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
        self.limits()
        for name in ("workers", "method_time"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')}={getattr(self, name)} must be at least 0.")
