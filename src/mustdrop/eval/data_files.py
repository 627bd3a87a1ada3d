"""The files of LLaVA's evaluation guide: found or named, read line by line, and hashed."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mustdrop.errors import DataFileError
from mustdrop.eval.result_parts import Failure

GUIDE = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md"
Row = dict[str, Any]
_TEXTS = ("image", "image_path", "text", "question", "category", "label", "video_name")  # keys whose values are texts
_PLAIN = ("question_id", "image_id", "id")  # keys whose values are texts or numbers


@dataclass
class Folder:
    """A folder of one benchmark, and what was read from it.

    Attributes:
        roots: places to look in, the first one first.
        guide: the page that describes the files.
        hashes: file name -> sha256 of every file read.
        broken: lines that could not be read.
    """

    roots: tuple[Path, ...]
    guide: str
    hashes: dict[str, str] = field(default_factory=dict)
    broken: list[Failure] = field(default_factory=list)

    def find(self, *names: str, folder: bool = False, what: str = "") -> Path:
        """The first of several names that exists.

        Args:
            *names: relative paths, the usual one first.
            folder: a folder rather than a file.
            what: what it holds, for the message.

        Raises:
            DataFileError: none exists; the message names the file, the places, and the guide.
        """
        for name in names:
            for root in self.roots:
                path = root / name
                if path.is_dir() if folder else path.is_file():
                    return path
        kind = "folder" if folder else "file"
        places = "\n".join(f"  {root / name}" for name in names for root in self.roots)
        raise DataFileError(
            f"the {kind} {' or '.join(names)}{f' ({what})' if what else ''} is missing. Looked for:\n{places}\n"
            f"Say where the data lie with --data DIR. {self.guide} describes where the {kind} comes from."
        )

    def reject(self, name: str | int, reason: str) -> None:
        """Note a question that cannot be asked; the result names it.

        Args:
            name: its id, or where it stands in its file.
            reason: what is wrong with it.
        """
        self.broken.append(Failure(name=str(name), reason=reason))

    def text(self, path: Path) -> str:
        """A file's text; it is hashed.

        Raises:
            DataFileError: not UTF-8.
        """
        content = path.read_bytes()
        self.hashes[path.name] = hashlib.sha256(content).hexdigest()
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataFileError(f"{path} is not UTF-8 text ({error}). {self.guide} says where it comes from.") from None

    def json(self, path: Path, kind: type) -> Any:
        """A JSON file whose outermost value is a `kind`.

        Raises:
            DataFileError: something else.
        """
        try:
            value = json.loads(self.text(path))
        except json.JSONDecodeError as error:
            raise DataFileError(f"{path} is not JSON ({error}). {self.guide} says where it comes from.") from None
        if not isinstance(value, kind):
            raise DataFileError(
                f"{path} should hold a JSON {kind.__name__}, got a {type(value).__name__}. {self.guide}"
            )
        return value

    def jsonl(self, path: Path, required: Sequence[str]) -> Iterator[Row]:
        """The objects of a file with one JSON object per line; broken lines go to `broken`.

        Args:
            path: the file.
            required: keys that every line must have.
        """
        for number, line in enumerate(self.text(path).split("\n"), 1):
            if not line.strip():
                continue
            name = f"{path.name} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                self.reject(name, f"not JSON: {error}")
                continue
            reason = lacks(row, required)
            if reason:
                self.reject(name, reason)
            else:
                yield row

    def objects(self, path: Path, rows: Sequence[Any], required: Sequence[str]) -> Iterator[Row]:
        """The objects of a JSON list that was read from `path`; broken ones go to `broken`."""
        for number, row in enumerate(rows, 1):
            reason = lacks(row, required)
            if reason:
                self.reject(f"{path.name} entry {number}", reason)
            else:
                yield row

    def tsv(self, path: Path, required: Sequence[str]) -> Iterator[Row]:
        """The rows of a tab-separated table with a head line; broken rows go to `broken`.

        Raises:
            DataFileError: a column is missing altogether.
        """
        csv.field_size_limit(sys.maxsize)
        lines = csv.DictReader(self.text(path).splitlines(keepends=True), delimiter="\t", strict=False)
        absent = [name for name in required if name not in (lines.fieldnames or [])]
        if absent:
            raise DataFileError(f"{path} has no column {', '.join(absent)}; it has {lines.fieldnames}. {self.guide}")
        for number, row in enumerate(lines, 1):
            empty = [name for name in required if not row[name]]
            if empty or None in row:
                reason = f"no {', '.join(empty)}" if empty else "more cells than columns"
                self.reject(f"{path.name} row {number}", reason)
            else:
                yield row


def lacks(row: Any, required: Sequence[str]) -> str:
    """What is wrong with a row that should be an object with certain keys; empty if nothing is."""
    if not isinstance(row, dict):
        return f"a JSON object was expected, got {type(row).__name__}"
    absent = [key for key in required if key not in row]
    if absent:
        return f"no {', '.join(absent)}"
    wrong = [f"{key} is a {type(row[key]).__name__}" for key in required if not _fits(key, row[key])]
    return f"{', '.join(wrong)}" if wrong else ""


def _fits(key: str, value: Any) -> bool:
    """Whether a value has the type that the guide's files have under a key."""
    if key in _TEXTS:
        return isinstance(value, str)
    return not isinstance(value, list | dict) or key not in _PLAIN
