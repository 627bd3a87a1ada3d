"""MME (arXiv 2306.13394): yes/no questions in fourteen categories, two to each picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from mustdrop.eval.benchmark import (
    QUESTION,
    SHORT,
    Answer,
    Benchmark,
    Columns,
    Item,
    Source,
    by_category,
    percent,
    write_answers,
)
from mustdrop.eval.data_files import Folder, Row
from mustdrop.eval.media import Picture

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_ABILITY = {
    "existence": "hallucination", "count": "counting", "position": "position", "color": "attributes", "OCR": "reading",
    "posters": "recognition", "celebrity": "recognition", "scene": "recognition", "landmark": "recognition",
    "artwork": "recognition", **dict.fromkeys(COGNITION, "reasoning"),
}  # fmt: skip
_RELEASE = "MME_Benchmark_release_version"
_YES_NO = "Please answer yes or no."
_PAIR = 2  # questions to a picture


def parse(text: str) -> str:
    """What MME's own script reads off an answer: "yes", "no" or "other"."""
    said = text.lower()
    if said in ("yes", "no"):
        return said
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


class MME(Benchmark):
    """Perception and cognition, the sum of accuracy and accuracy+ (both questions of a picture) over the categories."""

    name = "mme"
    title = "MME"
    folder = "MME"
    section = "mme"
    suffix = SHORT
    headline = "total"
    headline_max = 2800.0
    metric = "perception + cognition: accuracy % + accuracy+ %, summed over the categories"
    abilities: ClassVar[Mapping[str, str]] = _ABILITY
    columns: ClassVar[Columns] = {
        "id": ("question_id",),
        **QUESTION,
        "category": ("category",),
    }

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """From `llava_mme.jsonl` and the release's folder of categories."""
        questions = folder.find("llava_mme.jsonl", what="questions")
        release = folder.find(f"{_RELEASE}/MME_Benchmark", _RELEASE, folder=True, what="pictures and truths")
        truths = _truths(release)
        found = []
        for row in folder.jsonl(questions, ("question_id", "image", "text")):
            category, _, file = str(row["question_id"]).partition("/")
            item = Item(
                row["question_id"],
                row["text"],
                Picture(release / row["image"]),
                row["text"],
                truths.get((category, Path(file).stem, _bare(row["text"]))),
                category,
                {"file": file},
            )
            if item.truth is None:
                folder.reject(item.id, f"{release} has no truth for this question")
            else:
                found.append(item)
        return found

    def row_item(self, source: Source, place: int, row: Row) -> Item:
        """The question of a row; ids are the names of the files."""
        text = str(self.cell(row, "text")).rstrip() + self.suffix
        name = str(self.cell(row, "id"))
        return Item(
            name,
            text,
            self.row_picture(source, place, row),
            text,
            str(self.cell(row, "truth")).lower(),
            str(self.cell(row, "category")),
            {"file": name.rpartition("/")[2]},
        )

    def unit(self, item: Item, place: int) -> tuple[str, str]:
        """The picture."""
        return item.category, str(item.extra["file"])

    def credit(self, answer: Answer) -> float:
        """Whether the answer says what is true."""
        return float(not answer.failed and parse(answer.text) == answer.item.truth)

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Per category accuracy, accuracy+ and their sum; perception, cognition and total.

        A picture of which only one question could be read or asked has not both right.
        """
        found: dict[str, float] = {}
        for category, group in by_category(answers).items():
            pairs: dict[str, list[float]] = {}
            for answer in group:
                pairs.setdefault(str(answer.item.extra["file"]), []).append(self.credit(answer))
            accuracy = percent([self.credit(answer) for answer in group])
            plus = percent([float(len(pair) >= _PAIR and all(pair)) for pair in pairs.values()])
            found |= {f"{category}/accuracy": accuracy, f"{category}/accuracy+": plus, category: accuracy + plus}
        found["perception"] = sum(found.get(category, 0.0) for category in PERCEPTION)
        found["cognition"] = sum(found.get(category, 0.0) for category in COGNITION)
        return found | {"total": found["perception"] + found["cognition"]}

    def write(self, answers: Sequence[Answer], out: Path, model: str) -> list[Path]:
        """LLaVA's answer file, and one table per category as `calculation.py` reads them."""
        written = [write_answers(answers, out, model)]
        for category, group in by_category(answers).items():
            path = out / "mme" / f"{category}.txt"
            path.parent.mkdir(exist_ok=True)
            rows = [
                (
                    str(answer.item.extra["file"]),
                    f"{_bare(answer.item.text)} {_YES_NO}",
                    str(answer.item.truth).capitalize(),
                    " ".join(answer.text.split()),
                )
                for answer in group
            ]
            path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
            written.append(path)
        return written


def _bare(question: str) -> str:
    """A question without what is said after it; the release and LLaVA's file differ in spaces there."""
    return " ".join(question.replace(SHORT.strip(), "").replace(_YES_NO, "").split())


def _truths(release: Path) -> dict[tuple[str, str, str], str]:
    """(category, picture without ending, bare question) -> "yes" or "no", from the text files of the release."""
    found = {}
    for category in sorted(path for path in release.iterdir() if path.is_dir()):
        own = category / "questions_answers_YN"
        for path in sorted((own if own.is_dir() else category).glob("*.txt")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                question, _, truth = line.rpartition("\t")
                if question and truth.strip().lower() in ("yes", "no"):
                    found[category.name, path.stem, _bare(question)] = truth.strip().lower()
    return found
