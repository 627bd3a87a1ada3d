"""The result file of an evaluation: one JSON object with scores, tokens, costs, and where all of it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mustdrop.errors import ConfigError
from mustdrop.eval.result_parts import (
    AnswerInfo,
    CostInfo,
    DataInfo,
    Failure,
    LatencyInfo,
    MethodTimeInfo,
    ModelInfo,
    Part,
    PromptInfo,
    TimeInfo,
    TokenInfo,
)

SCHEMA_VERSION: Literal[1] = 1
RESULT = "result.json"  # its name in the folder of a run


class EvalResult(Part):
    """Everything that one evaluation found.

    Attributes:
        schema_version: raised when a field changes its meaning or goes.
        benchmark: name, as given to `mustdrop eval`.
        title: name, as papers write it.
        scores: all scores by name. Percent, but for sums such as MME's and OCRBench's.
        headline: name of the score that tables of papers show.
        headline_max: best value that the headline can have.
        metric: the headline in words; says so where it is not the official metric.
        method: name of the method.
        keep: budget as it was asked for, None where there is none.
        knobs: all settings of the method that were given, `keep` included.
        setup_sha256: over all settings but the method and its knobs: two results with the same value may be compared.
        model: the model.
        prompt: how the questions were put.
        data: the questions.
        tokens: vision tokens; None if no item has an image or a video.
        cost: FLOPs and KV bytes; None if nothing was answered.
        answer: what whole answers took; None if nothing was answered, and in files of older versions.
        latency: medians; None if nothing was answered.
        method_time: what the method took; None without `--method-time`, and in files of older versions.
        time: where the time went.
        peak_memory_bytes: most memory in use on the device, or of the process on the CPU; largest of all processes.
        failed: items that could not be asked, by name.
        failed_share: share of the asked items.
        answers: files written for the original scorer, relative to the result file.
        provenance: versions, hardware, threads, seed, date, commit, dirty (see `mustdrop.provenance`).
        resumed: provenance of later starts that differs from the first one's.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    benchmark: str
    title: str
    scores: dict[str, float]
    headline: str
    headline_max: float
    metric: str
    method: str
    keep: int | float | None
    knobs: dict[str, Any]
    setup_sha256: str
    model: ModelInfo
    prompt: PromptInfo
    data: DataInfo
    tokens: TokenInfo | None
    cost: CostInfo | None
    answer: AnswerInfo | None = None
    latency: LatencyInfo | None
    method_time: MethodTimeInfo | None = None
    time: TimeInfo
    peak_memory_bytes: int
    failed: list[Failure]
    failed_share: float
    answers: list[str]
    provenance: dict[str, Any]
    resumed: list[dict[str, Any]]

    @property
    def score(self) -> float | None:
        """The headline; None where only a server can compute it."""
        return self.scores.get(self.headline)

    def write(self, path: str | Path) -> Path:
        """Write as JSON, in one step: a reader never sees half a file."""
        path = Path(path)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return draft.replace(path)

    @classmethod
    def read(cls, path: str | Path) -> EvalResult:
        """Read a result file, or the one in a folder.

        Raises:
            ConfigError: no such file, or not a result of this schema.
        """
        path = Path(path)
        path = path / RESULT if path.is_dir() else path
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"there is no result file {path}. `mustdrop eval` writes one; give it or its folder."
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ConfigError(
                f"{path} is not a result of `mustdrop eval`, schema {SCHEMA_VERSION}: {place}: {first['msg']}."
            ) from None
