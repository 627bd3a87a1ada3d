"""VizWiz (arXiv 1802.08218): pictures and questions of blind people; test is scored by a server, val here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mustdrop.eval.benchmark import (
    QUESTION,
    SHORT,
    UNANSWERABLE,
    Answer,
    Columns,
    Item,
    Source,
    write_answers,
    write_json,
)
from mustdrop.eval.data_files import Folder, Row
from mustdrop.eval.media import Picture
from mustdrop.eval.soft_accuracy import SoftAccuracy
from mustdrop.eval.vqa import normalise


class VizWiz(SoftAccuracy):
    """Soft accuracy against ten human answers, "unanswerable" among them."""

    name = "vizwiz"
    title = "VizWiz"
    folder = "vizwiz"
    section = "viswiz"  # so spelt there
    splits = ("test", "val")
    suffix = UNANSWERABLE + SHORT
    metric = "soft accuracy after VQA normalisation (test is scored by EvalAI's server)"
    columns: ClassVar[Columns] = {
        "id": ("question_id", "image_id"),
        **QUESTION,
        "truth": ("answers",),
    }

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """From LLaVA's questions about the test pictures, or from VizWiz' own `val.json`."""
        if self.split(source) == "val":
            return self._val(folder)
        questions = folder.find("llava_test.jsonl", what="questions")
        images = folder.find("test", folder=True, what="pictures")
        return [
            Item(
                row["question_id"],
                row["text"],
                Picture(images / row["image"]),
                row["text"],
                extra={"file": row["image"]},
            )
            for row in folder.jsonl(questions, ("question_id", "image", "text"))
        ]

    def _val(self, folder: Folder) -> list[Item]:
        annotations = folder.find("val.json", "Annotations/val.json", what="questions and truths")
        images = folder.find("val", folder=True, what="pictures")
        found = []
        for row in folder.objects(annotations, folder.json(annotations, list), ("image", "question", "answers")):
            text = row["question"] + self.suffix
            truth = tuple(str(said["answer"]) for said in row["answers"])
            image = Picture(images / row["image"])
            found.append(Item(row["image"], text, image, text, truth, extra={"file": row["image"]}))
        return found

    def row_item(self, source: Source, place: int, row: Row) -> Item:
        """The question of a row; test has no answers."""
        text = str(self.cell(row, "text")) + self.suffix
        number = str(self.cell(row, "id"))
        said = row.get("answers") or None
        image = self.row_picture(source, place, row)
        return Item(number, text, image, text, said and tuple(str(one) for one in said), extra={"file": number})

    def write(self, answers: Sequence[Answer], out: Path, model: str) -> list[Path]:
        """LLaVA's answer file, and the upload: one answer per picture, in the order of the file."""
        rows = [{"image": answer.item.extra["file"], "answer": normalise(answer.text)} for answer in answers]
        return [write_answers(answers, out, model), write_json(out / "upload.json", rows)]
