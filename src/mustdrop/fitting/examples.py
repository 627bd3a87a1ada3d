"""Pictures and prompts to fit a scorer on: a file of one's own, or the questions of a benchmark that `eval` knows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mustdrop.errors import ConfigError, PictureError
from mustdrop.eval.batches import Inputs
from mustdrop.eval.benchmark import Item, Source
from mustdrop.eval.media import Clip, Medium, Picture
from mustdrop.eval.prompts import Prompter

_EXPECTED = (
    'expected lines of {"image": FILE, "question": TEXT} (or "video" in place of "image"), or a .csv file with these '
    "columns; FILE is looked for from the folder of the file"
)


def read(path: str | Path, frames: int = 8) -> list[Item]:
    """Questions about pictures or videos, from a file of lines of JSON or a .csv file.

    Args:
        path: of the file; each line has `image` or `video`, a path from the file's folder, and `question`.
        frames: of a video that the model sees.

    Raises:
        ConfigError: the file is missing or empty, or a line is something else; its number is named. Pictures are not
            looked at here.
    """
    where = Path(path)
    try:
        with where.open(encoding="utf-8", newline="") as file:
            return list(_items(where, _rows(where, file), frames))
    except OSError as error:
        raise ConfigError(f"the file {where} cannot be read ({error.strerror}): {_EXPECTED}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the file {where} is not text in UTF-8: {_EXPECTED}.") from error


def _rows(where: Path, file: Iterable[str]) -> Iterable[tuple[int, Any]]:
    """(number of the line, what it holds)."""
    if where.suffix.lower() == ".csv":
        reader = csv.DictReader(file)
        return [(reader.line_num, row) for row in reader]
    found = []
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except ValueError as error:
                raise ConfigError(f"{where}, line {number}: {_EXPECTED}; got {line.strip()[:80]!r}.") from error
    return found


def _items(where: Path, rows: Iterable[tuple[int, Any]], frames: int) -> Iterable[Item]:
    number = 0
    for line, row in rows:
        number += 1
        picture, video = (row.get(name) if isinstance(row, Mapping) else None for name in ("image", "video"))
        text = row.get("question") if isinstance(row, Mapping) else None
        if not isinstance(text, str) or not text.strip() or bool(picture) == bool(video):
            raise ConfigError(f"{where}, line {line}: {_EXPECTED}; got {str(row)[:80]!r}.")
        file = where.parent / str(picture or video)
        medium: Medium = Picture(file) if picture else Clip(file, frames)
        yield Item(f"line {line}", text, medium, text)
    if not number:
        raise ConfigError(f"{where} is empty: {_EXPECTED}.")


def of_benchmark(name: str, source: Source) -> list[Item]:
    """Questions of a benchmark that `mustdrop eval` knows; those without a picture are left out.

    Raises:
        UnknownMethodError: there is no such benchmark.
        DataFileError, ConfigError: see `mustdrop.eval`; or none of its questions has a picture.
    """
    from mustdrop.eval.benchmarks import find

    benchmark = find(name)
    items = [item for item in benchmark.items(source, benchmark.place(source)) if item.medium is not None]
    if not items:
        raise ConfigError(f"{name}: none of the questions has a picture to learn from.")
    return items[: source.limit]


def samples(items: Sequence[Item], prompter: Prompter) -> list[Callable[[], Mapping[str, Any]]]:
    """For each question a function that decodes its picture and calls the processor."""
    inputs = Inputs(items, prompter)

    def made(place: int) -> Mapping[str, Any]:
        batch = inputs[[place]]
        if batch.inputs is None:
            raise PictureError(batch.failed.get(place, "nothing came of it"))
        return batch.inputs

    return [lambda place=place: made(place) for place in range(len(items))]  # type: ignore[misc]
