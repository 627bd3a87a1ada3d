"""The result file of an evaluation: one JSON object with scores, tokens, costs, and where all of it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mustdrop.errors import ConfigError

SCHEMA_VERSION: Literal[1] = 1
RESULT = "result.json"  # its name in the folder of a run


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Part):
    """A quantity over the items that have it.

    Attributes:
        mean: arithmetic mean.
        std: standard deviation of the population.
        min: smallest value.
        max: largest value.
    """

    mean: float
    std: float
    min: float
    max: float


class ModelInfo(_Part):
    """The model that answered.

    Attributes:
        name: hub id or folder as it was given; "bundled" for the model of this package.
        architecture: class name.
        config_sha256: of the model's configuration, without names of folders.
        layers: decoder layers.
        dtype: of the weights.
        device: where it ran.
        attention: attention implementation of the text model.
        kernels: what the operations of `mustdrop.kernels` ran as (see `Trace.kernels`).
    """

    name: str
    architecture: str
    config_sha256: str
    layers: int
    dtype: str
    device: str
    attention: str
    kernels: str


class PromptInfo(_Part):
    """How the questions were put.

    Attributes:
        template: name of the conversation template ("vicuna_v1"), or "chat template of the processor".
        suffix: what the benchmark says after each question; empty where the question file has it inside.
        example: the first prompt, word for word.
        max_new_tokens: limit of an answer.
        pictures: what was done to them before the processor got them.
        decoding: "greedy".
    """

    template: str
    suffix: str
    example: str
    max_new_tokens: int
    pictures: str = "as the processor has it"
    decoding: Literal["greedy"] = "greedy"


class DataInfo(_Part):
    """The questions.

    Attributes:
        source: folder, or id of a data set.
        split: split, where the benchmark has several.
        sha256: over the contents of all files of questions and annotations (images not counted).
        files: file name -> sha256.
        questions: how many there are.
        asked: how many were asked (`--limit`).
        limit: `--limit`, or None.
        seed: of the choice that `--limit` makes; None takes the first ones.
    """

    source: str
    split: str
    sha256: str
    files: dict[str, str]
    questions: int
    asked: int
    limit: int | None
    seed: int | None


class TokenInfo(_Part):
    """Vision tokens of the items that have an image or a video.

    Attributes:
        items: how many items have one.
        total: vision tokens in the prompt, before anything is dropped.
        equal: equal tokens, the mean over the decoder layers of the vision tokens that a layer processes (a filter
            layer counts its input). This is what `keep` promises.
        reported: the same where a filter layer counts its output, as MustDrop's and SparseVLM's tables do.
    """

    items: int
    total: Spread
    equal: Spread
    reported: Spread


class CostInfo(_Part):
    """Cost of one item's prompt, mean over the items (formulas in `mustdrop.cost`).

    Attributes:
        flops: as it ran.
        flops_unpruned: without pruning.
        kv_bytes: keys and values stored at the end of the answer.
        kv_bytes_unpruned: without pruning.
    """

    flops: float
    flops_unpruned: float
    kv_bytes: float
    kv_bytes_unpruned: float

    @property
    def flops_ratio(self) -> float:
        """`flops` / `flops_unpruned`."""
        return self.flops / self.flops_unpruned if self.flops_unpruned else 1.0

    @property
    def kv_ratio(self) -> float:
        """`kv_bytes` / `kv_bytes_unpruned`."""
        return self.kv_bytes / self.kv_bytes_unpruned if self.kv_bytes_unpruned else 1.0


class AnswerInfo(_Part):
    """What a whole answer took, mean over the items. A pruned model may write longer answers, which costs too.

    Attributes:
        prompt_tokens: tokens of the prompt that a decoder layer processed, mean over the layers.
        tokens: tokens of the answer, with the one that ends it.
        flops: of the prompt and of every further token.
        flops_unpruned: of the same answer without pruning.
    """

    prompt_tokens: float
    tokens: float
    flops: float
    flops_unpruned: float


class LatencyInfo(_Part):
    """Measured times of the calls of the model; a call is one batch.

    Attributes:
        batch_size: rows of a full call.
        prefill_ms: median time to the first token, vision tower included.
        decode_ms: median time of one further token; None where no call had a further token.
    """

    batch_size: int
    prefill_ms: float
    decode_ms: float | None


class TimeInfo(_Part):
    """Where the time of the loop went, as shares that add up to 1 (summed over the processes).

    Attributes:
        seconds: time in the loop, all processes together, without loading the model.
        processes: how many ran.
        data: waiting for images and for the inputs made of them.
        vision: vision tower.
        prefill: first pass of the language model, with everything else before the first token.
        decode: further tokens.
        other: moving inputs, decoding text, writing the journal.
    """

    seconds: float
    processes: int
    data: float
    vision: float
    prefill: float
    decode: float
    other: float


class Failure(_Part):
    """An item that could not be asked, or a line that could not be read.

    An item counts as a wrong answer; a line that could not be read is in no score.

    Attributes:
        name: id of the question, or file and line.
        reason: what went wrong.
    """

    name: str
    reason: str


class EvalResult(_Part):
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
