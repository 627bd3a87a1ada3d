"""MMBench (arXiv 2307.06281), English and Chinese: choices, with pictures inside the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from mustdrop.eval.benchmark import (
    LETTER,
    LETTER_CN,
    QUESTION,
    Answer,
    Benchmark,
    Columns,
    Item,
    Source,
    percent,
    write_answers,
)
from mustdrop.eval.data_files import Folder, Row
from mustdrop.eval.media import Column, Encoded

_LETTERS = "ABCD"
_ROTATIONS = 1_000_000  # questions whose index is the same modulo this are one question with its choices turned
_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")  # columns that the upload does not have
_MARKS = ".()[],:;!*#{}"  # stand for blanks where a letter is looked for
_LAST_WORDS = 4  # the letter must be among these
_ARTICLE = 3  # words of an answer, up to which "A" is a letter
_PLACE = 6  # where the upload has its predictions


def parse(text: str, options: Sequence[str]) -> str | None:
    """The letter that the rules of MMBench's evaluator read off an answer; None where it would ask a language model.

    One letter of the options among the last words, and no other letter anywhere; "A" in a sentence may be the article.
    Failing that, the text of one option inside the answer, and of no other.

    Args:
        text: what the model said.
        options: the choices.
    """
    letters = _LETTERS[: len(options)]
    words = "".join(" " if mark in _MARKS else mark for mark in text).split()
    said = [letter for letter in letters if letter in words]
    article = said == ["A"] and len(words) > _ARTICLE
    if len(said) == 1 and not article and words.index(said[0]) >= len(words) - _LAST_WORDS:
        return said[0]
    if len(text) > 2 * sum(map(len, options)):
        return None
    inside = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in text.lower()]
    return inside[0] if len(inside) == 1 else None


class MMBench(Benchmark):
    """Accuracy where every turned copy of a question must be right."""

    name = "mmbench"
    title = "MMBench"
    folder = "mmbench"
    section = "mmbench"
    suffix = LETTER
    max_new_tokens = 1024
    headline = "circular"
    metric = (
        "accuracy with all turned copies of a question right; letters are read by the evaluator's rules, where these "
        "fail the server asks GPT"
    )
    requires = ("openpyxl",)
    file: ClassVar[str] = "mmbench_dev_20230712"
    columns: ClassVar[Columns] = {
        "id": ("index",),
        **QUESTION,
        "hint": ("hint",),
        "category": ("category",),
    }

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """From the table of the guide."""
        path = folder.find(f"{self.file}.tsv", what="questions with pictures")
        required = ("index", "question", "A", "B", "image")
        return [self._item(row, Encoded(row["image"])) for row in folder.tsv(path, required)]

    def row_item(self, source: Source, place: int, row: Row) -> Item:
        """The question of a row, which has the columns of the table."""
        return self._item(row, self.row_picture(source, place, row))

    def _item(self, row: Row, medium: Encoded | Column) -> Item:
        options: list[str] = []
        for letter in _LETTERS:
            if _absent(row.get(letter)):
                break
            options.append(str(row[letter]))
        hint = row.get("hint")
        text = str(row["question"]) if _absent(hint) else f"{hint}\n{row['question']}"
        text += "".join(f"\n{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
        truth = row.get("answer")
        return Item(
            int(row["index"]),
            text,
            medium,
            text + self.suffix,
            None if _absent(truth) else str(truth),
            str(row.get("category") or ""),
            {
                "round": 0,
                "options": options,
                "letters": list(_LETTERS[: len(options)]),
                "row": {key: value for key, value in row.items() if key != "image"},
            },
        )

    def unit(self, item: Item, place: int) -> int:
        """The question with its turned copies."""
        return int(item.id) % _ROTATIONS

    def credit(self, answer: Answer) -> float | None:
        """Whether the answer names the right letter; None where only the server knows."""
        if answer.item.truth is None:
            return None
        return float(not answer.failed and _said(answer) == answer.item.truth)

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Accuracy of the rows, and of the questions with all their copies; nothing where only the server can say."""
        known = [(answer, credit) for answer in answers if (credit := self.credit(answer)) is not None]
        if not known:
            return {}
        questions: dict[int, list[float]] = {}
        for answer, credit in known:
            questions.setdefault(int(answer.item.id) % _ROTATIONS, []).append(credit)
        return {
            "circular": percent([float(all(copies)) for copies in questions.values()]),
            "accuracy": percent([credit for _, credit in known]),
            "unreadable": percent([float(_said(answer) is None) for answer, _ in known]),
        }

    def write(self, answers: Sequence[Answer], out: Path, model: str) -> list[Path]:
        """LLaVA's answer file, and the table that the server reads."""
        more = {"round_id": "round", "options": "options", "option_char": "letters"}
        written = write_answers(answers, out, model, **more)
        return [written, self._upload(answers, out / f"{self.file}.xlsx")]

    def _upload(self, answers: Sequence[Answer], path: Path) -> Path:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

        names = [name for name in answers[0].item.extra["row"] if name.lower() not in _DROPPED] if answers else []
        book = Workbook()
        sheet = book.active
        sheet.append([*names[:_PLACE], "prediction", *names[_PLACE:]])
        for answer in answers:
            row = answer.item.extra["row"]
            cells = [int(row[name]) if name == "index" else _cell(row[name]) for name in names]
            said = ILLEGAL_CHARACTERS_RE.sub("", answer.text)
            sheet.append([*cells[:_PLACE], said, *cells[_PLACE:]])
        book.save(path)
        return path


class MMBenchCN(MMBench):
    """The same in Chinese."""

    name = "mmbench-cn"
    title = "MMBench-CN"
    section = "mmbench-cn"
    suffix = LETTER_CN
    file = "mmbench_dev_cn_20231003"


def _said(answer: Answer) -> str | None:
    return parse(answer.text, answer.item.extra["options"])


def _absent(value: Any) -> bool:
    """Whether a cell is empty, as the tables write that."""
    return value is None or value != value or str(value).strip().lower() in ("", "nan", "none")


def _cell(value: Any) -> Any:
    return None if _absent(value) else value
