"""The parts of a result file: model, prompt, data, tokens, costs, times, and what failed."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Base of the result and of its parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(Part):
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


class ModelInfo(Part):
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


class PromptInfo(Part):
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


class DataInfo(Part):
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


class TokenInfo(Part):
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


class CostInfo(Part):
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


class AnswerInfo(Part):
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


class LatencyInfo(Part):
    """Measured times of the calls of the model; a call is one batch.

    Attributes:
        batch_size: rows of a full call.
        prefill_ms: median time to the first token, vision tower included.
        decode_ms: median time of one further token; None where no call had a further token.
    """

    batch_size: int
    prefill_ms: float
    decode_ms: float | None


class MethodTimeInfo(Part):
    """What the method took of the time to the first token, measured apart from the run (`mustdrop.method_time`).

    Medians over questions that were asked one by one, after a call of each that nobody clocked. The clock waits for the
    device at every turn from the model to the method and back, so both take longer than in the run.

    Attributes:
        questions: how many were measured.
        method_ms: time of the method.
        prefill_ms: time to the first token of the same calls, vision tower and method included.
        device: where they ran.
    """

    questions: int
    method_ms: float
    prefill_ms: float
    device: str

    @property
    def share(self) -> float:
        """`method_ms` / `prefill_ms`."""
        return self.method_ms / self.prefill_ms if self.prefill_ms else 0.0


class TimeInfo(Part):
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


class Failure(Part):
    """An item that could not be asked, or a line that could not be read.

    An item counts as a wrong answer; a line that could not be read is in no score.

    Attributes:
        name: id of the question, or file and line.
        reason: what went wrong.
    """

    name: str
    reason: str
