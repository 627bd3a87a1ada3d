"""The loop: batches in, lines of the journal out. The times in the lines add up to the time that passed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from mustdrop.errors import BudgetError
from mustdrop.eval.engine import Engine, Said
from mustdrop.eval.journal import Line
from mustdrop.eval.loading import Batch, Inputs, batches
from mustdrop.eval.prepare import Prepared

_NO_TIME = {"data": 0.0, "vision": 0.0, "prefill": 0.0, "decode": 0.0, "other": 0.0}


def ask_all(ready: Prepared, wanted: Sequence[list[int]]) -> Iterator[list[Line]]:
    """The lines of each batch.

    Args:
        ready: questions and model.
        wanted: places of the items of each batch.

    Raises:
        BudgetError: the first call refused every prompt, so the budget suits none.
    """
    inputs = Inputs(ready.items, ready.prompter)
    last, any_answer = time.perf_counter(), False
    for batch in batches(inputs, wanted, ready.settings.workers):
        arrived = time.perf_counter()
        lines = _asked(ready, inputs, batch, strict=not any_answer) if batch.places else []
        answered = [line for line in lines if "text" in line]
        any_answer |= bool(answered)
        now = time.perf_counter()
        for line in answered:
            times = line["times"]
            times["data"] = (arrived - last) / len(answered)
            times["other"] = (now - arrived) / len(answered) - times["vision"] - times["prefill"] - times["decode"]
        last = now
        yield [{"item": place, "failed": reason} for place, reason in batch.failed.items()] + lines


def _asked(ready: Prepared, inputs: Inputs, batch: Batch, strict: bool) -> list[Line]:
    """The answers to a batch. Where the budget does not suit one of its prompts, they are asked one by one."""
    engine, limit = ready.engine, ready.prompt.max_new_tokens
    try:
        return _lines(batch, engine.ask(batch, limit), engine)
    except BudgetError as error:
        refused = error
    lines: list[Line] = []
    for place in batch.places:
        alone = inputs[[place]]
        try:
            lines += _lines(alone, engine.ask(alone, limit), engine)
        except BudgetError as error:
            lines.append({"item": place, "failed": str(error)})
    if strict and all("failed" in line for line in lines):
        raise refused
    return lines


def _lines(batch: Batch, said: Said, engine: Engine) -> list[Line]:
    rows, trace = len(batch.places), said.trace
    after = [*trace.tokens[1:].tolist(), [len(trace.kept(trace.tokens.shape[0], row)) for row in range(rows)]]
    total, equal = trace.total.tolist(), trace.equal_tokens.tolist()
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
