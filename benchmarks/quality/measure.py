"""Asks everything of every cell: one pass per prompt tells accuracy, log-likelihood and fidelity.

The right answer is forced on the model, token by token. Greedy search gives exactly this answer if and only if each of
its tokens is the most likely one after those before it, so the same pass says whether the model is right and how likely
the right answer is. Fidelity needs the unpruned model's answer forced; where that is the right one (most of the time)
the pass serves for both, and elsewhere the prompt is asked a second time.
"""

from __future__ import annotations

import time
import traceback
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty
from typing import Any

import torch
import torch.multiprocessing
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import mustdrop
from benchmarks.quality.cells import Cell
from benchmarks.quality.journal import Journal
from benchmarks.quality.subjects import Batch, Part, Subject
from mustdrop import fidelity
from mustdrop.errors import (
    BudgetError,
    ConfigError,
    NothingDroppedWarning,
    UnsupportedModelError,
    UnsupportedOptionError,
)

#: A method that says no: the row says "cannot", and why. Any other error is a fault, and ends the run.
REFUSALS = (BudgetError, ConfigError, UnsupportedModelError, UnsupportedOptionError)


@dataclass(frozen=True)
class Asked:
    """A part with the answers to force: row i of the first `count` is prompt i with the right answer.

    Attributes:
        part: the prompts.
        inputs: of all rows.
        count: prompts of the part; further rows are prompts with another answer of the unpruned model.
        tokens: (R, T) long, what is forced.
        lengths: (R,) long.
        logits: (R, T, V), of the unpruned model.
        own: (count,) long, the row in which each prompt's unpruned answer is forced.
        given: of each prompt, whether the unpruned answer is right; empty where nothing is right.
    """

    part: Part
    inputs: dict[str, Tensor]
    count: int
    tokens: Tensor
    lengths: Tensor
    logits: Tensor
    own: Tensor
    given: list[bool]


Missing = Mapping[str, Sequence[Cell]]  # name of a batch -> the cells that are not measured on it


def measure(subject: Subject, found: Sequence[Cell], journal: Journal, jobs: int = 1) -> None:
    """Fill the journal with every cell on every batch that it lacks; `jobs` processes share the batches."""
    missing = {name: [cell for cell in found if (*cell.key, name) not in journal] for name in subject.names()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        total = len(found) * len(missing)
        task = progress.add_task("asking", total=total, completed=total - sum(map(len, missing.values())))
        wanted = {name: cells for name, cells in missing.items() if cells}
        for done in _shared(subject, wanted, jobs) if min(jobs, len(wanted)) > 1 else lines(subject, wanted):
            journal.add(done)
            budget = "" if done["keep"] is None else f" {done['keep']:.1%}"
            progress.update(task, advance=1, description=f"{done['batch']} {done['method']}{budget}")


def lines(subject: Subject, missing: Missing) -> Iterator[dict[str, Any]]:
    """The journal's lines of these cells, in this process."""
    for batch in subject.batches(list(missing)):
        asked = [ask(batch.model, part) for part in batch.parts]
        for cell in missing[batch.name]:
            yield line(cell, batch, asked)


def _shared(subject: Subject, missing: Missing, jobs: int) -> Iterator[dict[str, Any]]:
    """As :func:`lines`, from several processes: every batch is measured by one of them."""
    context = torch.multiprocessing.get_context("spawn")
    queue, names = context.Queue(), list(missing)
    shares = [{name: missing[name] for name in names[job::jobs]} for job in range(min(jobs, len(names)))]
    threads = torch.get_num_threads()
    workers = [context.Process(target=_work, args=(subject, own, queue, threads), daemon=True) for own in shares]
    for worker in workers:
        worker.start()
    try:
        left = len(workers)
        while left:
            try:
                said = queue.get(timeout=1)
            except Empty:
                if dead := [worker.exitcode for worker in workers if worker.exitcode]:
                    raise RuntimeError(f"a process ended with {dead[0]}; what was measured is in the journal") from None
                continue
            if isinstance(said, str):
                raise RuntimeError(f"a process failed; what was measured is in the journal\n{said}")
            if said is None:
                left -= 1
            else:
                yield said
    finally:
        for worker in workers:
            worker.terminate()


def _work(subject: Subject, missing: Missing, queue: Any, threads: int) -> None:
    """What one process does: its lines, then None; the text of an error in their place."""
    torch.set_num_threads(threads)
    try:
        for done in lines(subject, missing):
            queue.put(done)
        queue.put(None)
    except Exception:
        queue.put(traceback.format_exc())


def ask(model: Any, part: Part) -> Asked:
    """The unpruned model's answers to a part, and what it thinks of the right ones."""
    inputs = part.everything
    given = fidelity.reference(model, inputs, part.new_tokens)
    count = len(given.tokens)
    if part.truths is None:
        return Asked(part, inputs, count, given.tokens, given.lengths, given.logits, torch.arange(count), [])
    answers = [row[:n].tolist() for row, n in zip(given.tokens, given.lengths, strict=True)]
    other = [i for i, (answer, truth) in enumerate(zip(answers, part.truths, strict=True)) if answer != truth]
    rows = [*range(count), *other]
    forced = [*part.truths, *(answers[i] for i in other)]
    own = torch.arange(count)
    own[other] = torch.arange(count, len(rows))
    right = [i not in other or part.right(i, answer) for i, answer in enumerate(answers)]
    lengths = torch.tensor([len(row) for row in forced])
    tokens = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in forced])
    inputs = part.inputs(rows)
    logits = fidelity.forced_logits(model, inputs, tokens)
    return Asked(part, inputs, count, tokens, lengths, logits, own, right)


def line(cell: Cell, batch: Batch, asked: Sequence[Asked]) -> dict[str, Any]:
    """The journal's line of a cell on a batch."""
    method, keep = cell.key
    head = {"method": method, "keep": keep, "batch": batch.name, "model": batch.who, "scenes": batch.scenes}
    start = time.perf_counter()
    try:
        seen = [(part, *_one(cell, batch, place, part)) for place, part in enumerate(asked)]
    except REFUSALS as refusal:
        return head | {"cannot": f"{type(refusal).__name__}: {refusal}"}
    traces = [trace for _, trace, _ in seen]
    answers: dict[str, dict[str, list[Any]]] = {}
    for one, _, numbers in seen:
        numbers = {"scene": one.part.scenes} | numbers
        for row, kind in enumerate(one.part.types):
            own = answers.setdefault(kind, {name: [] for name in numbers})
            for name, values in numbers.items():
                own[name].append(values[row])
    equal = [n for part, trace, _ in seen for n in trace.equal_tokens[: part.count].tolist()]
    totals = [n for part, trace, _ in seen for n in trace.total[: part.count].tolist()]
    return head | {
        "equal_tokens": sum(equal) / len(equal),
        "most_equal_tokens": max(equal),
        "equal_share": sum(a / b for a, b in zip(equal, totals, strict=True)) / len(equal),
        "flops": sum(trace.flops.ratio for trace in traces) / len(traces),
        "kv": sum(trace.kv_bytes.ratio for trace in traces) / len(traces),
        "seconds": round(time.perf_counter() - start, 3),
        "answers": answers,
    }


def _one(cell: Cell, batch: Batch, place: int, asked: Asked) -> tuple[mustdrop.Trace, dict[str, list[Any]]]:
    """The patched model on one part: its trace and, per measure, a number for each prompt.

    Methods that draw do so anew for every part: one draw decides for all of its prompts.
    """
    draw = zlib.crc32(f"{batch.name}/{place}".encode())
    with _quiet(), cell.patched(batch.model, draw):
        logits = fidelity.forced_logits(batch.model, asked.inputs, asked.tokens)
        trace = mustdrop.trace(batch.model)
        close = fidelity.compare(asked.logits[asked.own], logits[asked.own], asked.lengths[asked.own])
        same = close.same.tolist()
        numbers = {"kl": _rounded(close.kl), "agreement": _rounded(close.agreement), "same": [int(x) for x in same]}
        length = asked.lengths[asked.own].tolist()
        if asked.given:
            first = slice(asked.count)
            tokens, lengths = asked.tokens[first], asked.lengths[first]
            wrong = (logits[first].argmax(-1) != tokens) & (torch.arange(tokens.shape[1]) < lengths[:, None])
            exact = (~wrong.any(-1)).tolist()
            correct = [exact[i] or (same[i] and asked.given[i]) for i in range(asked.count)]
            length = [int(lengths[i]) if exact[i] else length[i] for i in range(asked.count)]
            for row, said in _answers(batch.model, asked.part, [e or s for e, s in zip(exact, same, strict=True)]):
                length[row], correct[row] = len(said), asked.part.right(row, said)
            numbers["correct"] = [int(x) for x in correct]
            numbers["loglik"] = _rounded(fidelity.log_likelihood(logits[first], tokens, lengths))
    numbers["length"] = length
    numbers |= _cost(trace, asked, length)
    return trace, numbers


def _answers(model: Any, part: Part, known: Sequence[bool]) -> Iterator[tuple[int, list[int]]]:
    """What the model says of itself to the prompts whose answer the forced pass does not tell."""
    rows = [row for row, told in enumerate(known) if not told]
    if not rows:
        return
    inputs = part.inputs(rows)
    out = fidelity.respond(model, inputs, part.new_tokens).sequences[:, inputs["input_ids"].shape[1] :].cpu()
    for row, tokens, length in zip(rows, out, fidelity.lengths_of(out, model).tolist(), strict=True):
        yield row, tokens[:length].tolist()


def _cost(trace: mustdrop.Trace, asked: Asked, length: Sequence[int]) -> dict[str, list[float]]:
    """Of each answer: tokens of the prompt that a decoder layer processes, and FLOPs beside those of the unpruned one.

    FLOPs are those of a mean row of the call, and of as many decode steps as the answer needs.
    """
    rows, step = len(asked.tokens), trace.flops.parts["decode_step"]
    words = asked.inputs["attention_mask"].sum(1).tolist()
    processed = [w - n + e for w, n, e in zip(words, trace.total.tolist(), trace.equal_tokens.tolist(), strict=True)]
    unpruned = asked.lengths[asked.own].tolist()
    return {
        "prompt": [float(f"{n:.5g}") for n in processed[: asked.count]],
        "flops": [float(f"{(trace.flops.actual + step.actual * (n - 1)) / rows:.5g}") for n in length],
        "flops_unpruned": [float(f"{(trace.flops.unpruned + step.unpruned * (n - 1)) / rows:.5g}") for n in unpruned],
    }


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


@contextmanager
def _quiet() -> Any:
    """The journal says how many tokens were kept; a warning per batch says nothing more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingDroppedWarning)
        yield
