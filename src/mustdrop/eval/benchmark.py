"""What a benchmark states about itself: its files, its prompts, its answer file, its metric. One file each."""

from __future__ import annotations

import hashlib
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mustdrop.errors import ConfigError, DataFileError, did_you_mean
from mustdrop.eval.data_files import GUIDE, Folder, Row
from mustdrop.eval.media import Column, Medium

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."

Columns = Mapping[str, tuple[str, ...]]
#: The columns that most data sets of `datasets` have in common.
QUESTION: Columns = {"image": ("image",), "text": ("question",), "truth": ("answer",)}


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: id of the question, as its file has it.
        text: the question as the answer file repeats it.
        medium: its picture or video; None for a question about text alone.
        asked: what the model is asked: `text` with the benchmark's suffix, where the file does not have it inside.
        truth: what the metric compares with; None where only a server knows.
        category: what scores are split by.
        extra: what else the answer file or the metric needs.
    """

    id: str | int
    text: str
    medium: Medium | None
    asked: str
    truth: Any = None
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a model said to an item; `failed` where it could not be asked (the text is empty then)."""

    item: Item
    text: str
    failed: bool = False


@dataclass(frozen=True)
class Source:
    """Where the questions come from.

    Attributes:
        data: folder that the user named, or None for the guide's.
        rows: rows of a data set of `datasets`, or None.
        split: split that the user named, or None for the benchmark's own.
        seed: of benchmarks that make their questions.
        limit: how many questions will be asked at most.
        frames: frames of a video.
        coordinates: what the numbers of an answer about a place count; "auto" tells it from their size.
    """

    data: Path | None = None
    rows: Any = None
    split: str | None = None
    seed: int = 0
    limit: int | None = None
    frames: int = 8
    coordinates: str = "auto"


class Benchmark(ABC):
    """Base of the benchmarks.

    Attributes:
        name: as `mustdrop eval` takes it.
        title: as papers write it.
        folder: where the guide puts its files, below `playground/data/eval`.
        section: heading in the guide.
        splits: known splits, the default first; empty if there is one only.
        suffix: what is said after each question where the files do not have it inside.
        max_new_tokens: limit of an answer.
        headline: the score that tables of papers show.
        headline_max: its best value.
        metric: the headline in words.
        requires: modules that writing the answers needs.
        abilities: category -> what its questions ask for, in words that benchmarks share.
        general: the same for questions of other categories.
        columns: for `--dataset`: what a row is asked for -> names that the columns may have; empty if there is none.
        files_only: what is said to `--dataset` where there is none, after the name.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folder: ClassVar[str]
    section: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ()
    suffix: ClassVar[str] = ""
    max_new_tokens: ClassVar[int] = 128
    headline: ClassVar[str] = "accuracy"
    headline_max: ClassVar[float] = 100.0
    metric: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    abilities: ClassVar[Mapping[str, str]] = {}
    general: ClassVar[str] = "general"
    columns: ClassVar[Columns] = {}
    files_only: ClassVar[str] = "is read from its files: give --data, and leave --dataset out."
    guide: ClassVar[str] = GUIDE

    def place(self, source: Source) -> Folder:
        """The folder of the files.

        Raises:
            DataFileError: the user named a file.
        """
        if source.data is None:
            roots: tuple[Path, ...] = (Path("playground/data/eval") / self.folder,)
        else:  # the benchmark's own folder, or one that holds all benchmarks as the guide has them
            if source.data.is_file():
                raise DataFileError(f"--data {source.data} is a file: give the folder that holds it.")
            roots = (source.data, source.data / self.folder)
        return Folder(roots, f"{self.guide}#{self.section}")

    def split(self, source: Source) -> str:
        """The split in use.

        Raises:
            ConfigError: the benchmark does not have it.
        """
        if source.split is None or (source.rows is None and source.split in self.splits):
            return source.split or (self.splits[0] if self.splits else "")
        if source.rows is None:
            raise ConfigError(f"{self.name} has no split {source.split!r}. {did_you_mean(source.split, self.splits)}")
        return source.split

    def items(self, source: Source, folder: Folder) -> list[Item]:
        """The questions in the order of their file, from the folder or from `source.rows`.

        Raises:
            ConfigError: `--dataset` was given, and the benchmark has no columns or misses one of them.
            DataFileError: a file is missing or broken.
        """
        if source.rows is None:
            return self.file_items(source, folder)
        if not self.columns:
            raise ConfigError(f"{self.name} {self.files_only}")
        return [self.row_item(source, place, row) for place, row in enumerate(source.rows)]

    @abstractmethod
    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """The questions from the files of the benchmark's guide; lines that cannot be read go to `folder.broken`."""

    def row_item(self, source: Source, place: int, row: Row) -> Item:
        """The question of one row of a data set: by default its text with the suffix, its picture and its truth."""
        text = str(self.cell(row, "text")) + self.suffix
        return Item(self.cell(row, "id"), text, self.row_picture(source, place, row), text, self.cell(row, "truth"))

    def row_picture(self, source: Source, place: int, row: Row) -> Column:
        """The picture of a row, which is decoded when it is asked for."""
        return Column(source.rows, place, self.column(row, "image"))

    @abstractmethod
    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """All scores, the headline among them unless only a server can compute it."""

    def unit(self, item: Item, place: int) -> Hashable:
        """What is scored as one: `--limit` takes items of the same unit together, so that its scores mean the same.

        Args:
            item: a question.
            place: its place among all.
        """
        return place

    def ability(self, item: Item) -> str:
        """What a question asks for: tables group questions of all benchmarks by it."""
        return self.abilities.get(item.category, self.general)

    def credit(self, answer: Answer) -> float | None:
        """How right one answer is, 0 to 1, for the progress display; None where only a server knows."""
        return None

    def write(self, answers: Sequence[Answer], out: Path, model: str) -> list[Path]:
        """Write the files that the original scorer reads: by default LLaVA's answer file alone."""
        return [write_answers(answers, out, model)]

    def column(self, row: Row, what: str) -> str:
        """The name of the column of a data set's row that holds `what`.

        Raises:
            ConfigError: none of the known names is there.
        """
        names = self.columns[what]
        for name in names:
            if name in row:
                return name
        raise ConfigError(
            f"--dataset: {self.name} needs a column {' or '.join(names)}, and the data set has {', '.join(row)}."
        )

    def cell(self, row: Row, what: str) -> Any:
        """The value of the column that holds `what`."""
        return row[self.column(row, what)]


def write_jsonl(path: Path, rows: Sequence[Row]) -> Path:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write one JSON value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def write_answers(answers: Sequence[Answer], out: Path, model: str, **more: str) -> Path:
    """Write LLaVA's answer file, `answers.jsonl`.

    The random id of an answer is made from its place and text here, so that equal runs write equal files.

    Args:
        answers: in the order of the question file.
        out: folder.
        model: name of the model.
        **more: further keys of each line -> names in the item's `extra`.
    """
    rows = []
    for place, answer in enumerate(answers):
        item = answer.item
        rows.append(
            {"question_id": item.id}
            | {key: item.extra[name] for key, name in more.items() if key == "round_id"}
            | {"prompt": item.text, "text": answer.text}
            | {key: item.extra[name] for key, name in more.items() if key != "round_id"}
            | {"answer_id": _short_id(f"{place} {item.id} {answer.text}"), "model_id": model, "metadata": {}}
        )
    return write_jsonl(out / "answers.jsonl", rows)


def _short_id(text: str) -> str:
    return uuid.UUID(bytes=hashlib.sha256(text.encode()).digest()[:16]).hex[:22]


def percent(values: Sequence[float]) -> float:
    """The mean in percent; 0 of nothing."""
    return 100.0 * sum(values) / len(values) if values else 0.0


def by_category(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Answers by the category of their items, in the order in which categories appear."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.item.category, []).append(answer)
    return found
