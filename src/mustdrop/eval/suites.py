"""Published tables as lmms-eval commands: what to run, and what the table says should come out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mustdrop.errors import ConfigError, did_you_mean

_FILE = Path(__file__).with_name("suites.json")


@dataclass(frozen=True)
class Cell:
    """One method at one budget.

    Attributes:
        method: its name.
        keep: the budget; None for the unpruned model.
        knobs: its other settings.
        value: what the table says; None where it says nothing.
    """

    method: str
    keep: float | None
    knobs: Mapping[str, Any] = field(default_factory=dict)
    value: float | None = None


@dataclass(frozen=True)
class Suite:
    """One published table.

    Attributes:
        name: as the command takes it.
        source: where it was read.
        about: the model, the benchmarks and what the numbers are.
        model: hub id.
        tasks: names of lmms-eval's tasks.
        note: what to know; may be empty.
        cells: the unpruned model first.
        arguments: further `--model_args`.
    """

    name: str
    source: str
    about: str
    model: str
    tasks: Sequence[str]
    note: str
    cells: Sequence[Cell]
    arguments: str = ""

    def command(self, cell: Cell) -> str:
        """The command for one cell; the answers of each go into a folder of their own."""
        settings = {"method": cell.method} | ({} if cell.keep is None else {"keep": cell.keep}) | dict(cell.knobs)
        run = "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in settings.values())
        arguments = [f"pretrained={self.model}", *(f"{name}={value}" for name, value in settings.items())]
        if self.arguments:
            arguments.append(self.arguments)
        return (
            f"python -m lmms_eval --model mustdrop_hf --model_args {','.join(arguments)} "
            f"--tasks {','.join(self.tasks)} --batch_size 1 --log_samples --output_path results/{self.name}/{run}"
        )


@cache
def suites() -> dict[str, Suite]:
    """All tables that this package knows, by name."""
    found = {}
    for name, table in json.loads(_FILE.read_text(encoding="utf-8")).items():
        cells = [Cell("none", None, value=100.0)]
        for method, knobs, *values in table["rows"]:
            cells += [Cell(method, keep, knobs, value) for keep, value in zip(table["keep"], values, strict=True)]
        about = {key: value for key, value in table.items() if key not in ("keep", "rows")}
        found[name] = Suite(name=name, cells=cells, **about)
    return found


def find(name: str) -> Suite:
    """A table by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in suites():
        raise ConfigError(f"there is no suite {name!r}. {did_you_mean(name, suites())}")
    return suites()[name]
