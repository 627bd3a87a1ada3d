"""The loop: batches in, lines of the journal out. The times in the lines add up to the time that passed.

Whatever goes wrong with one question is its own failure, and the run goes on. It ends where no question can be right:
the first ones all fail, so that it lies in the settings; the device is lost; somebody interrupts it.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Iterator, Sequence

import torch

from mustdrop.errors import MustDropError
from mustdrop.eval.batches import Batch, Inputs, batches
from mustdrop.eval.engine import Engine, Said
from mustdrop.eval.journal import Line
from mustdrop.eval.prepare import Prepared

HOPELESS = 16  # so many questions may all fail at the start before the run ends
_LONGEST = 500  # characters of a reason
_NO_TIME = {"data": 0.0, "vision": 0.0, "prefill": 0.0, "decode": 0.0, "other": 0.0}


class NoneAnsweredError(Exception):
    """Every question of a batch failed.

    Attributes:
        lines: their lines.
        first: what was raised for the first of them.
    """

    def __init__(self, lines: list[Line], first: Exception) -> None:
        self.lines, self.first = lines, first


def ask_all(
    ready: Prepared, wanted: Sequence[list[int]], *, begun: bool = False, shared: bool = False
) -> Iterator[list[Line]]:
    """The lines of each batch.

    Args:
        ready: questions and model.
        wanted: places of the items of each batch.
        begun: whether questions of this run were answered before.
        shared: whether other processes have questions of this run.

    Raises:
        MustDropError: mustdrop refused all questions, and this process has them all: it lies in the settings.
        Exception: none of the first `HOPELESS` could be asked; what was raised for the first of them. And whatever is
            raised when the device is lost.
    """
    inputs = Inputs(ready.items, ready.prompter)
    last, any_answer = time.perf_counter(), begun
    held: list[Line] = []  # failures before the first answer: if none comes, they say nothing about the questions
    first: Exception | None = None
    for batch in batches(inputs, wanted, ready.settings.workers):
        arrived = time.perf_counter()
        try:
            lines = _asked(ready, inputs, batch, strict=not any_answer) if batch.places else []
        except NoneAnsweredError as none:
            lines, first = none.lines, first or none.first
        answered = [line for line in lines if "text" in line]
        any_answer |= bool(answered)
        now = time.perf_counter()
        for line in answered:
            times = line["times"]
            times["data"] = (arrived - last) / len(answered)
            times["other"] = (now - arrived) / len(answered) - times["vision"] - times["prefill"] - times["decode"]
        last = now
        held += [{"item": place, "failed": reason} for place, reason in batch.failed.items()] + lines
        if first is not None and not any_answer:
            if len(held) >= HOPELESS:
                raise first
            continue
        yield held
        held = []
    if held:
        if isinstance(first, MustDropError) and not shared:
            raise first
        yield held


def _asked(ready: Prepared, inputs: Inputs, batch: Batch, strict: bool) -> list[Line]:
    """The answers to a batch, and by name what could not be asked. If the batch fails, each is asked alone.

    Args:
        ready: the model.
        inputs: makes the inputs of one question alone.
        batch: questions that go together.
        strict: whether to raise if every question fails.

    Raises:
        NoneAnsweredError: every question failed, under `strict`.
    """
    lines: list[Line] = []
    first: Exception | None = None
    together = batch.inputs is not None
    if together:
        lines, first = _said(ready, batch)
    if not together or (first is not None and len(batch.places) > 1):
        refused, lines, first = first, [], None
        for place in batch.places:
            one = inputs[[place]]
            own, error = _said(ready, one) if one.places else ([{"item": place, "failed": one.failed[place]}], None)
            lines, first = lines + own, first or error
        if first is None and refused is not None:
            warnings.warn(
                f"a batch of {len(batch.places)} failed, and its questions were asked one by one, which takes longer: "
                f"{_reason(refused)}",
                RuntimeWarning,
                stacklevel=2,
            )
    if strict and first is not None and all("failed" in line for line in lines):
        raise NoneAnsweredError(lines, first)
    return lines


def _said(ready: Prepared, batch: Batch) -> tuple[list[Line], Exception | None]:
    """The lines of one call; if it fails, those of its failure and what was raised.

    Raises:
        torch.AcceleratorError: the device is lost, and no later call would succeed.
    """
    try:
        return _lines(batch, ready.engine.ask(batch, ready.prompt.max_new_tokens), ready.engine), None
    except torch.AcceleratorError:
        raise
    except Exception as error:  # of the model, a kernel, a cache: one question must not end a run of thousands
        _release(error)
        return [{"item": place, "failed": _reason(error)} for place in batch.places], error


def _reason(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:_LONGEST]
    return text if isinstance(error, MustDropError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def _release(error: BaseException | None) -> None:
    """Let go of the tensors that the frames of a failed call hold; the traceback still prints."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _lines(batch: Batch, said: Said, engine: Engine) -> list[Line]:
    rows, trace = len(batch.places), said.trace
    after = [*trace.tokens[1:].tolist(), [len(trace.kept(trace.tokens.shape[0], row)) for row in range(rows)]]
    total, equal = trace.total.tolist(), trace.equal_tokens.tolist()
    step = trace.flops.parts["decode_step"]
    return [
        {
            "item": place,
            "text": said.texts[row],
            "total": total[row],
            "equal": equal[row],
            "reported": sum(layer[row] for layer in after) / len(after),
            "flops": trace.flops.actual / rows,
            "flops_unpruned": trace.flops.unpruned / rows,
            "kv": trace.kv_bytes.actual / rows,
            "kv_unpruned": trace.kv_bytes.unpruned / rows,
            "prompt": said.prompts[row] - total[row] + equal[row],
            "tokens": said.lengths[row],
            "answer_flops": (trace.flops.actual + step.actual * (said.lengths[row] - 1)) / rows,
            "answer_flops_unpruned": (trace.flops.unpruned + step.unpruned * (said.lengths[row] - 1)) / rows,
            "first_s": said.first,
            "step_s": said.decode / (said.steps - 1) if said.steps > 1 else None,
            "times": _NO_TIME
            | {
                "vision": said.vision / rows,
                "prefill": (said.first - said.vision) / rows,
                "decode": said.decode / rows,
            },
            "peak": engine.peak_memory(),
            "kernels": trace.kernels,
        }
        for row, place in enumerate(batch.places)
    ]
