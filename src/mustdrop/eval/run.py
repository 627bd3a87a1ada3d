"""One evaluation from its settings to its result file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mustdrop.eval.answer_loop import ask_all
from mustdrop.eval.batches import plan
from mustdrop.eval.benchmark import Answer, Item
from mustdrop.eval.journal import Journal, Line
from mustdrop.eval.method_times import measure
from mustdrop.eval.prepare import Prepared, prepare
from mustdrop.eval.processes import share
from mustdrop.eval.questions import QUESTIONS, Told, write
from mustdrop.eval.result import RESULT, EvalResult
from mustdrop.eval.settings import Settings
from mustdrop.eval.summary import summarise
from mustdrop.provenance import provenance


class Watcher(Protocol):
    """Is told how a run goes on."""

    def begin(self, ready: Prepared, total: int, answers: Sequence[tuple[Item, Line]]) -> None:
        """Before the first question: how many this process has, and those that were answered before."""

    def answered(self, answers: Sequence[tuple[Item, Line]]) -> None:
        """After each batch."""


def evaluate(
    settings: Settings, watcher: Watcher | None = None, loaded: tuple[Any, Any] | None = None
) -> EvalResult | None:
    """Run an evaluation, or go on with one that was interrupted.

    Started several times at once by `accelerate launch`, `torchrun` or MPI, the processes share the questions. The
    first one puts the result together.

    Args:
        settings: what to do.
        watcher: is told how it goes on.
        loaded: the model and its processor (`mustdrop.eval.engine.load`), for several runs of one model; afterwards
            they are as they were.

    Returns:
        The result, which was also written to the folder; None in all processes but the first.

    Raises:
        DataFileError: a file is missing or broken; the message says where it was looked for.
        ConfigError: settings that contradict each other, or that differ from those of the run in the folder.
        MustDropError: what the model or the method does not support.
    """
    place = share()
    rank, world = place.rank, place.world
    settings.check(world)
    ready = prepare(settings, loaded)
    try:
        return _run(ready, watcher, rank, world)
    finally:
        if loaded is not None:
            ready.engine.close()


def _run(ready: Prepared, watcher: Watcher | None, rank: int, world: int) -> EvalResult | None:
    settings = ready.settings
    journal = Journal(settings.folder, rank)
    journal.claim(ready.identity)
    journal.open()
    try:
        journal.write([{"start": provenance(settings.seed or 0), "processes": world}])
        _work(ready, journal, rank, world, watcher)
    finally:
        journal.close()
    return None if rank else _finish(ready, journal)


def _work(ready: Prepared, journal: Journal, rank: int, world: int, watcher: Watcher | None) -> None:
    """Ask this process' share of the questions, but for those that are answered already."""
    items = ready.items
    done = journal.answers(retry=ready.settings.retry_failed)
    mine = [batch for i, batch in enumerate(plan(items, ready.settings.batch_size)) if i % world == rank]
    todo = [rest for batch in mine if (rest := [place for place in batch if place not in done])]
    if watcher is not None:
        own = [place for batch in mine for place in batch]
        watcher.begin(ready, len(own), [(items[place], done[place]) for place in own if place in done])
    begun = any("text" in line for line in done.values())
    for lines in ask_all(ready, todo, begun=begun, shared=world > 1):
        journal.write(lines)
        if watcher is not None:
            watcher.answered([(items[line["item"]], line) for line in lines])


def _finish(ready: Prepared, journal: Journal) -> EvalResult:
    """Wait for the other processes, then write the answer files and the result."""
    found = journal.wait(len(ready.items))
    lines = [found[place] for place in range(len(ready.items))]
    answers = [
        Answer(item, line.get("text", ""), "failed" in line) for item, line in zip(ready.items, lines, strict=True)
    ]
    folder = ready.settings.folder
    written = ready.benchmark.write(answers, folder, ready.engine.name)
    files = [str(path.relative_to(folder)) for path in written]
    write(folder / QUESTIONS, (_told(ready, answer, line) for answer, line in zip(answers, lines, strict=True)))
    result = summarise(ready, answers, lines, files, journal.starts(), journal.method_time())
    result.write(folder / RESULT)
    return _measured(ready, journal, lines, result) if ready.settings.method_time else result


def _measured(ready: Prepared, journal: Journal, lines: Sequence[Line], result: EvalResult) -> EvalResult:
    """The result with what the method takes; the journal keeps that, so that a later start does not lose it."""
    info = measure(ready, lines)
    if info is None:
        return result
    try:
        journal.write([{"method_time": info.model_dump()}])
    finally:
        journal.close()
    result = result.model_copy(update={"method_time": info})
    result.write(ready.settings.folder / RESULT)
    return result


def _told(ready: Prepared, answer: Answer, line: Line) -> Told:
    item, benchmark = answer.item, ready.benchmark
    return Told(
        id=str(item.id),
        category=item.category,
        ability=benchmark.ability(item),
        text=answer.text,
        credit=0.0 if answer.failed else benchmark.credit(answer),
        prompt_tokens=line.get("prompt"),
        tokens=line.get("tokens"),
        flops=line.get("answer_flops"),
    )
