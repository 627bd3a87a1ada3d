"""Published tables as commands: what to run, and what the table says should come out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mustdrop.errors import ConfigError, did_you_mean
from mustdrop.eval.published import rows as published_rows
from mustdrop.eval.report.paired import Groups

_FILE = Path(__file__).with_name("suites.json")
_ALWAYS = ("none", "downsample")  # what the other rows are compared with
_KIT_LINES = """\
# Add to the end of vlmeval/config.py in your VLMEvalKit:
from mustdrop.integrations.vlmevalkit import MustDropVLM"""


@dataclass(frozen=True)
class Cell:
    """One method at one budget.

    Attributes:
        method: its name.
        keep: the budget; None for the unpruned model, and where a knob says how much is dropped.
        knobs: its other settings.
        value: what the table says: one number, or one for each benchmark, or VTC-Bench's two groups of each; None where
            it says nothing, or where it could not be read.
        frames: of each video, where that differs from cell to cell.
    """

    method: str
    keep: float | None
    knobs: Mapping[str, Any] = field(default_factory=dict)
    value: float | Mapping[str, float | Groups] | None = None
    frames: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The method with all its settings."""
        return {"method": self.method} | ({} if self.keep is None else {"keep": self.keep}) | dict(self.knobs)

    @property
    def run(self) -> str:
        """A name for the run: no two cells of a table have the same."""
        settings = self.settings if self.frames is None else self.settings | {"frames": self.frames}
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in settings.values())

    @property
    def label(self) -> str:
        """The method and its settings, to be read."""
        if self.method == "none":
            return "unpruned"
        return " ".join(
            [self.method, *(f"{name}={value}" for name, value in self.settings.items() if name != "method")]
        )

    @property
    def shown(self) -> str:
        """The value in words, where it is one number or none."""
        if self.value is None:
            return f"{self.label}: no value"
        return f"{self.label}: {self.value}" if self.method == "none" else str(self.value)


@dataclass(frozen=True)
class Step:
    """Something to run.

    Attributes:
        text: a comment with the values, and what to run.
        plain: the same for JSON.
    """

    text: str
    plain: dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """One published table.

    Attributes:
        name: as the command takes it.
        source: where it was read.
        about: the model, the benchmarks and what the numbers are.
        model: hub id.
        tasks: names of the harness's benchmarks.
        note: what to know; may be empty.
        cells: the unpruned model first.
        arguments: further `--model_args`.
        harness: what the commands run: "lmms-eval", "VLMEvalKit" or "mustdrop eval".
    """

    name: str
    source: str
    about: str
    model: str
    tasks: Sequence[str]
    note: str
    cells: Sequence[Cell]
    arguments: str = ""
    harness: str = "lmms-eval"

    def steps(self, methods: Sequence[str] = ()) -> list[Step]:
        """What to run, in order.

        Args:
            methods: only these, and what they are compared with; none for all.

        Raises:
            ConfigError: the table has no row of a method.
        """
        rows = dict.fromkeys(cell.method for cell in self.cells)
        for method in methods:
            if method not in rows:
                raise ConfigError(f"{self.name} has no row of {method!r}. {did_you_mean(method, rows)}")
        cells = [cell for cell in self.cells if not methods or cell.method in (*_ALWAYS, *methods)]
        written = {"lmms-eval": self._lmms_eval, "VLMEvalKit": self._vlmevalkit, "mustdrop eval": self._own}
        return list(written[self.harness](cells))

    def _lmms_eval(self, cells: Sequence[Cell]) -> Iterator[Step]:
        """A command for each cell; the answers of each go into a folder of their own."""
        for cell in cells:
            arguments = [f"pretrained={self.model}", *(f"{name}={value}" for name, value in cell.settings.items())]
            arguments += [] if cell.frames is None else [f"max_num_frames={cell.frames}"]
            arguments += [self.arguments] if self.arguments else []
            command = (
                f"python -m lmms_eval --model mustdrop_hf --model_args {','.join(arguments)} "
                f"--tasks {','.join(self.tasks)} --batch_size 1 --log_samples "
                f"--output_path results/{self.name}/{cell.run}"
            )
            plain = {"command": command, "method": cell.method, "keep": cell.keep, "value": cell.value}
            yield Step(f"# {cell.shown}\n{command}", plain)

    def _vlmevalkit(self, cells: Sequence[Cell]) -> Iterator[Step]:
        """Lines for the table of models, and the command that runs them."""
        yield Step(_KIT_LINES, {"line": _KIT_LINES.splitlines()[1]})
        names = []
        for cell in cells:
            names.append(f"{self.name}-{cell.run}")
            settings = ", ".join(f"{name}={value!r}" for name, value in cell.settings.items())
            line = f'supported_VLM["{names[-1]}"] = partial(MustDropVLM, "{self.model}", {settings})'
            plain = {"line": line, "method": cell.method, "keep": cell.keep, "value": cell.value}
            yield Step(f"# {cell.shown}\n{line}", plain)
        command = f"python run.py --data {' '.join(self.tasks)} --model {' '.join(names)}"
        yield Step(f"# Then, in VLMEvalKit:\n{command}", {"command": command})

    def _own(self, cells: Sequence[Cell]) -> Iterator[Step]:
        """For each benchmark, a command for all methods of the same settings, and one report at the end."""
        together: dict[str, list[Cell]] = {}
        for cell in cells:
            knobs = "".join(f" --knob {name}={value}" for name, value in cell.knobs.items())
            together.setdefault(knobs, []).append(cell)
        for task in self.tasks:
            for knobs, some in together.items():
                methods = "".join(f" --method {method}" for method in dict.fromkeys(cell.method for cell in some))
                budgets = ",".join(
                    f"{keep:g}" for keep in dict.fromkeys(cell.keep for cell in some) if keep is not None
                )
                keep = f" --keep {budgets}" if budgets else ""
                command = f"python -m mustdrop eval {task} --model {self.model}{methods}{knobs}{keep}"
                found = [(cell, cell.value[task]) for cell in some if isinstance(cell.value, Mapping)]
                lines = [f"# {cell.label}: {_words(value)}" for cell, value in found]
                values = [{"method": cell.method, "keep": cell.keep, "value": _plain(value)} for cell, value in found]
                yield Step(
                    "\n".join([f"# {task}", *lines, command]), {"command": command, "benchmark": task, "values": values}
                )
        command = "python -m mustdrop report mustdrop-eval"
        yield Step(f"# All of them side by side\n{command}", {"command": command})


def _words(value: float | Groups) -> str:
    if isinstance(value, Groups):
        return f"group A {value.hard_right} of {value.hard} right, group B {value.easy_right} of {value.easy}"
    return f"{value:g}"


def _plain(value: float | Groups) -> Any:
    return asdict(value) if isinstance(value, Groups) else value


@cache
def suites() -> dict[str, Suite]:
    """All tables that this package knows, by name."""
    found = {}
    for name, table in json.loads(_FILE.read_text(encoding="utf-8")).items():
        cells = _published(table["published"]) if "published" in table else _cells(table)
        parts = ("keep", "rows", "frames", "groups", "unpruned", "published")
        about = {key: value for key, value in table.items() if key not in parts}
        found[name] = Suite(name=name, cells=list(cells), **about)
    return found


def _cells(table: dict[str, Any]) -> Iterator[Cell]:
    """The unpruned model, and each row at each budget.

    A knob with a list has one value for each budget and stands in its place. `frames` starts with the unpruned model's.
    """
    frames = table.get("frames", [None] * (1 + len(table["keep"])))
    yield Cell("none", None, value=table.get("unpruned", 100.0), frames=frames[0])
    for method, knobs, *values in table["rows"]:
        if "groups" in table and values:
            values = _grouped(table["groups"], values[0])
        for place, keep in enumerate(table["keep"]):
            own = {name: value[place] if isinstance(value, list) else value for name, value in knobs.items()}
            instead = any(isinstance(value, list) for value in knobs.values())
            value = values[place] if values else None
            yield Cell(method, None if instead else keep, own, value, frames[1 + place])


def _grouped(sizes: dict[str, Any], right: dict[str, Any]) -> list[dict[str, Groups]]:
    """For each budget, the two groups of each benchmark, from (hard, easy) lists with a number for each budget."""
    counts = {task: zip(*sizes[task], *right[task], strict=True) for task in sizes}
    rows = {task: [Groups(hard, hit, easy, kept) for hard, easy, hit, kept in own] for task, own in counts.items()}
    return [dict(zip(rows, own, strict=True)) for own in zip(*rows.values(), strict=True)]


def _published(model: str) -> Iterator[Cell]:
    """A table of `mustdrop.eval.published`: one score for each benchmark."""
    table: dict[tuple[str, int], dict[str, float]] = {}
    for row in published_rows():
        if row.model == model:
            table.setdefault((row.method, row.tokens), {})[row.benchmark] = row.score
    for (method, tokens), scores in table.items():
        yield Cell(method, None if method == "none" else tokens, value=scores)


def find(name: str) -> Suite:
    """A table by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in suites():
        raise ConfigError(f"there is no suite {name!r}. {did_you_mean(name, suites())}")
    return suites()[name]
