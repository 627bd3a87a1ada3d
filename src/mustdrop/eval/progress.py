"""The progress bar of `python -m mustdrop eval`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mustdrop.eval.benchmark import Answer, Item
from mustdrop.eval.output import notes

if TYPE_CHECKING:
    from mustdrop.eval.journal import Line
    from mustdrop.eval.prepare import Prepared

_EVERY = 60.0  # seconds between two lines of progress where there is no terminal


class Bar:
    """Progress on the error stream: questions, time left, accuracy so far and tokens kept so far."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=notes,
        )
        self.credits: list[float] = []
        self.tokens: list[float] = []
        self.failed = 0
        self.told = time.monotonic()

    def begin(self, ready: Prepared, total: int, answers: Sequence[tuple[Item, Line]]) -> None:
        """Show the bar, with what was answered before."""
        self.ready = ready
        self.task = self.progress.add_task(ready.benchmark.title, total=total, state="")
        self.progress.start()
        self.answered(answers)

    def end(self) -> None:
        """Leave the bar as it is; nothing where none was shown."""
        if self.progress.tasks:
            self.progress.stop()

    def answered(self, answers: Sequence[tuple[Item, Line]]) -> None:
        """Move the bar."""
        for item, line in answers:
            if "failed" in line:
                self.failed += 1
                continue
            credit = self.ready.benchmark.credit(Answer(item, line["text"]))
            self.credits += [] if credit is None else [credit]
            self.tokens += [line["equal"]] if line["total"] else []
        self.progress.update(self.task, advance=len(answers), state=self.state())
        if not notes.is_terminal and time.monotonic() - self.told > _EVERY:  # a log file gets a line now and then
            self.told = time.monotonic()
            task = self.progress.tasks[0]
            left = "" if task.time_remaining is None else f", {timedelta(seconds=round(task.time_remaining))} left"
            notes.print(f"{task.completed:.0f} of {task.total:.0f}{left}, {self.state()}", highlight=False)

    def state(self) -> str:
        """What is known so far."""
        said = []
        if self.credits:
            said.append(f"right {sum(self.credits) / len(self.credits):.1%}")
        if self.tokens:
            said.append(f"tokens per layer {sum(self.tokens) / len(self.tokens):.1f}")
        if self.failed:
            said.append(f"failed {self.failed}")
        return ", ".join(said)
