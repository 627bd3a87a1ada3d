"""POPE (arXiv 2305.10355): is there such an object in the picture? Yes or no, in three ways to pick the objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from mustdrop.errors import DataFileError
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
)
from mustdrop.eval.data_files import Folder, Row
from mustdrop.eval.media import Picture

CATEGORIES = ("random", "popular", "adversarial")
_FIXED_COMMIT = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"


def parse(text: str) -> str:
    """What LLaVA's script reads off an answer: "no" if "No", "no" or "not" is among the words, else "yes".

    Only what stands before the first period counts, without commas.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in words for word in ("No", "no", "not")) else "yes"


class POPE(Benchmark):
    """F1 of "yes", the mean of the three categories."""

    name = "pope"
    title = "POPE"
    folder = "pope"
    section = "pope"
    suffix = SHORT
    headline = "f1"
    metric = "F1, mean of random, popular and adversarial"
    general = "hallucination"
    columns: ClassVar[Columns] = {
        "id": ("question_id", "id"),
        **QUESTION,
        "category": ("category",),
    }

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """From LLaVA's questions, POPE's `coco_pope_*.json` and COCO's val2014."""
        questions = folder.find("llava_pope_test.jsonl", what="questions")
        images = folder.find("val2014", folder=True, what="pictures of COCO")
        rows = list(folder.jsonl(questions, ("question_id", "image", "text", "category")))
        truths = {name: self._truths(folder, name) for name in dict.fromkeys(row["category"] for row in rows)}
        if not folder.broken:
            self._check(folder, rows, truths)
        places = dict.fromkeys(truths, 0)
        found = []
        for row in rows:
            category = row["category"]
            lines, keys = truths[category]
            truth = keys.get((row["image"], row["text"].split("\n")[0]), lines[min(places[category], len(lines) - 1)])
            places[category] += 1
            found.append(
                Item(row["question_id"], row["text"], Picture(images / row["image"]), row["text"], truth, category)
            )
        return found

    def _truths(self, folder: Folder, category: str) -> tuple[list[str], dict[tuple[str, str], str]]:
        """The labels of a category by place, and by picture and question where the file has these."""
        path = folder.find(f"coco/coco_pope_{category}.json", f"coco_pope_{category}.json", what="truths")
        before = len(folder.broken)
        rows = list(folder.jsonl(path, ("label",)))
        if len(folder.broken) > before or not rows:
            raise DataFileError(
                f"{path} is broken ({folder.broken[-1].name if folder.broken else 'empty'}), and labels go by place. "
                f"Get it again: {_FIXED_COMMIT}"
            )
        keys = {(row["image"], row["text"]): row["label"] for row in rows if "image" in row and "text" in row}
        return [row["label"] for row in rows], keys

    def _check(
        self, folder: Folder, rows: Sequence[Row], truths: dict[str, tuple[list[str], dict[tuple[str, str], str]]]
    ) -> None:
        """Labels go by place, so every category needs as many of them as questions."""
        for category, (lines, _) in truths.items():
            asked = sum(row["category"] == category for row in rows)
            if asked != len(lines):
                raise DataFileError(
                    f"coco_pope_{category}.json has {len(lines)} labels for {asked} questions: it is of another "
                    f"version of POPE. {folder.guide} names the right one: {_FIXED_COMMIT}"
                )

    def row_item(self, source: Source, place: int, row: Row) -> Item:
        """The question of a row, with its category."""
        text = str(self.cell(row, "text")).strip() + self.suffix
        image = self.row_picture(source, place, row)
        truth, category = str(self.cell(row, "truth")).lower(), str(self.cell(row, "category"))
        return Item(self.cell(row, "id"), text, image, text, truth, category)

    def credit(self, answer: Answer) -> float:
        """Whether the answer says what is true."""
        return float(not answer.failed and parse(answer.text) == answer.item.truth)

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Accuracy, precision, recall, F1 and the share of "yes" of each category; the means of F1 and accuracy."""
        found: dict[str, float] = {}
        groups = by_category(answers)
        for category, group in groups.items():
            found |= {f"{category}/{name}": value for name, value in _counts(group).items()}
        for name in ("f1", "accuracy"):
            found[name] = sum(found[f"{category}/{name}"] for category in groups) / len(groups) if groups else 0.0
        return found


def _said(answer: Answer) -> str:
    """The answer; a failed item is wrong, whatever its truth."""
    if answer.failed:
        return "no" if answer.item.truth == "yes" else "yes"
    return parse(answer.text)


def _counts(group: Sequence[Answer]) -> dict[str, float]:
    pairs = [(_said(answer), answer.item.truth) for answer in group]
    hits, false = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    missed, right = pairs.count(("no", "yes")), pairs.count(("no", "no"))
    precision = hits / (hits + false) if hits + false else 0.0
    recall = hits / (hits + missed) if hits + missed else 0.0
    return {
        "accuracy": 100.0 * (hits + right) / len(pairs),
        "precision": 100.0 * precision,
        "recall": 100.0 * recall,
        "f1": 100.0 * 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes": percent([float(said == "yes") for said, _ in pairs]),
    }
