"""ScienceQA (arXiv 2209.09513): school questions with choices, half of them about a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from mustdrop.eval.benchmark import (
    LETTER,
    QUESTION,
    Answer,
    Benchmark,
    Columns,
    Item,
    Source,
    percent,
    write_answers,
    write_json,
)
from mustdrop.eval.data_files import Folder, Row
from mustdrop.eval.media import Picture

LETTERS = "ABCDE"
_IMAGE = "<image>"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")  # any character may follow: so the script has it


def parse(text: str) -> str | None:
    """The letter that LLaVA's script reads off an answer; None if it reads none.

    The text is a letter, starts with "X. ", or says "The answer is X" and something after it, exactly once.
    """
    if text in LETTERS and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    said = _SENTENCE.findall(text)
    return said[0] if len(said) == 1 else None


class ScienceQA(Benchmark):
    """Accuracy over the questions with a picture, as papers report it."""

    name = "scienceqa"
    title = "ScienceQA"
    folder = "scienceqa"
    section = "scienceqa"
    splits = ("test", "val")
    suffix = LETTER
    max_new_tokens = 1024
    headline = "image"
    metric = "accuracy of the questions with a picture"
    general = "knowledge"
    columns: ClassVar[Columns] = {
        "id": ("id", "question_id", "pid"),
        **QUESTION,
        "choices": ("choices",),
        "hint": ("hint",),
    }

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """From LLaVA's conversations and ScienceQA's problems."""
        split = self.split(source)
        questions = folder.find(f"llava_{split}_CQM-A.json", what="questions")
        problems = folder.json(folder.find("problems.json", what="truths"), dict)
        members = folder.json(folder.find("pid_splits.json", what="members of the splits"), dict)
        images = folder.find(f"images/{split}", split, folder=True, what="pictures")
        wanted = {str(name) for name in members.get(split, [])}
        rows = folder.objects(questions, folder.json(questions, list), ("id", "conversations"))
        found = []
        for row in rows:
            item = self._item(row, problems.get(str(row["id"])), images)
            if isinstance(item, str):
                folder.reject(row["id"], item)
            elif str(row["id"]) in wanted:
                found.append(item)
        missing = wanted - {
            str(row["id"]) for row in folder.json(questions, list) if isinstance(row, dict) and "id" in row
        }
        for name in sorted(missing):
            folder.reject(name, f"not in {questions.name}")
        return found

    def _item(self, row: Row, problem: Any, images: Path) -> Item | str:
        """The question, or what is wrong with it."""
        if not isinstance(problem, dict) or problem.get("answer") not in range(len(LETTERS)):
            return "problems.json has no answer to this question"
        try:
            bare = row["conversations"][0]["value"].replace(_IMAGE, "").strip()
        except (IndexError, KeyError, TypeError, AttributeError):
            return "conversations[0].value is missing"
        asked = bare + self.suffix
        medium = Picture(images / row["image"]) if row.get("image") else None
        text = asked if medium is None else f"{_IMAGE}\n{asked}"
        choices = problem.get("choices", LETTERS)
        return Item(row["id"], text, medium, asked, LETTERS[int(problem["answer"])], extra={"choices": len(choices)})

    def row_item(self, source: Source, place: int, row: Row) -> Item:
        """The question of a row, as LLaVA words it; half of them have no picture."""
        lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, self.cell(row, "choices"), strict=False)]
        context = f"Context: {self.cell(row, 'hint') or 'N/A'}"
        asked = "\n".join([context, f"Question: {self.cell(row, 'text')}", f"Options: {' '.join(lines)}"]) + self.suffix
        medium = None if self.cell(row, "image") is None else self.row_picture(source, place, row)
        number = next((row[key] for key in self.columns["id"] if key in row), place)
        text = asked if medium is None else f"{_IMAGE}\n{asked}"
        return Item(number, text, medium, asked, LETTERS[int(self.cell(row, "truth"))], extra={"choices": len(lines)})

    def credit(self, answer: Answer) -> float:
        """Whether the answer names the right letter."""
        return float(not answer.failed and parse(answer.text) == answer.item.truth)

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Accuracy of all questions and of those with a picture; the share of answers without a letter."""
        image = [self.credit(answer) for answer in answers if _IMAGE in answer.item.text]
        text = [self.credit(answer) for answer in answers if _IMAGE not in answer.item.text]
        return {
            "image": percent(image),
            **({"text": percent(text)} if text else {}),
            "accuracy": percent(image + text),
            "unreadable": percent([float(parse(answer.text) is None) for answer in answers]),
        }

    def write(self, answers: Sequence[Answer], out: Path, model: str) -> list[Path]:
        """LLaVA's answer file, and ScienceQA's own result file."""
        results = {str(answer.item.id): _index(answer) for answer in answers}
        outputs = {str(answer.item.id): answer.text for answer in answers}
        right = sum(self.credit(answer) for answer in answers)
        own = {
            "acc": self.scores(answers)["accuracy"],
            "correct": int(right),
            "count": len(answers),
            "results": results,
            "outputs": outputs,
        }
        return [write_answers(answers, out, model), write_json(out / "scienceqa_result.json", own)]


def _index(answer: Answer) -> int:
    """The place of the choice that an answer names; -1 if it names none that there is."""
    letter = parse(answer.text)
    return -1 if letter is None else LETTERS[: answer.item.extra["choices"]].find(letter)
