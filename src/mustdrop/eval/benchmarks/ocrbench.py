"""OCRBench (arXiv 2305.07895): reading text, 1000 questions, one point each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mustdrop.eval.benchmark import QUESTION, Answer, Benchmark, Columns, Item, Source, write_answers, write_json
from mustdrop.eval.data_files import Folder, Row
from mustdrop.eval.media import Column, Picture

_FORMULAS = "HME100k"  # spaces do not count there, capitals do
_RECOGNITION = "Recognition"


def contains(text: str, truths: Sequence[str], source: str) -> bool:
    """Whether an answer contains one of the expected texts, as OCRBench's script compares them.

    Args:
        text: the answer.
        truths: the expected texts.
        source: the data set that the question comes from.
    """

    def plain(said: str) -> str:
        if source == _FORMULAS:
            return said.strip().replace("\n", " ").replace(" ", "")
        return said.lower().strip().replace("\n", " ")

    return any(plain(truth) in plain(text) for truth in truths)


class OCRBench(Benchmark):
    """How many of the 1000 questions are right."""

    name = "ocrbench"
    title = "OCRBench"
    folder = "OCRBench"
    section = "ocrbench"
    guide = "https://github.com/Yuliang-Liu/MultimodalOCR/blob/main/OCRBench/README.md"
    max_new_tokens = 100
    headline = "total"
    headline_max = 1000.0
    metric = "right answers of 1000: one of the expected texts is inside"
    general = "reading"
    columns: ClassVar[Columns] = {
        "id": ("id", "question_id"),
        **QUESTION,
        "truth": ("answer", "answers"),
        "category": ("question_type", "type"),
        "source": ("dataset", "dataset_name"),
    }

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """From OCRBench's own file and pictures."""
        path = folder.find("OCRBench.json", "OCRBench/OCRBench.json", what="questions and truths")
        images = folder.find("OCRBench_Images", "images", folder=True, what="pictures")
        required = ("dataset_name", "id", "image_path", "question", "answers", "type")
        rows = folder.objects(path, folder.json(path, list), required)
        return [
            self._item(
                row, Picture(images / row["image_path"]), row["id"], row["answers"], row["type"], row["dataset_name"]
            )
            for row in rows
        ]

    def row_item(self, source: Source, place: int, row: Row) -> Item:
        """The question of a row; without an id it has that of its place."""
        image = self.row_picture(source, place, row)
        number = next((row[key] for key in self.columns["id"] if key in row), place)
        return self._item(
            row, image, number, self.cell(row, "truth"), self.cell(row, "category"), self.cell(row, "source")
        )

    def _item(
        self, row: Row, medium: Picture | Column, number: str | int, truth: str | list[str], kind: str, source: str
    ) -> Item:
        truths = (truth,) if isinstance(truth, str) else tuple(str(one) for one in truth)
        text = str(row["question"])
        kept = {key: value for key, value in row.items() if key != "image"}
        return Item(number, text, medium, text, truths, kind, {"source": source, "row": kept})

    def credit(self, answer: Answer) -> float:
        """Whether one of the expected texts is inside."""
        item = answer.item
        return float(not answer.failed and contains(answer.text, item.truth, str(item.extra["source"])))

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Points of each category, of the six kinds of recognition together, and of all."""
        found: dict[str, float] = {}
        for answer in answers:
            found[answer.item.category] = found.get(answer.item.category, 0.0) + self.credit(answer)
        recognition = sum(points for name, points in found.items() if name.endswith(f"Text {_RECOGNITION}"))
        recognition += sum(found.get(f"{name} {_RECOGNITION}", 0.0) for name in ("Handwriting", "Digit String"))
        return found | {"recognition": recognition, "total": sum(found.values())}

    def write(self, answers: Sequence[Answer], out: Path, model: str) -> list[Path]:
        """LLaVA's answer file, and OCRBench's file with `predict` and `result`."""
        rows = [
            dict(answer.item.extra["row"]) | {"predict": answer.text, "result": int(self.credit(answer))}
            for answer in answers
        ]
        return [write_answers(answers, out, model), write_json(out / "ocrbench.json", rows)]
