"""VQAv2 (arXiv 1612.00837): test-dev, which a server scores, and val, which is scored here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mustdrop.eval.benchmark import (
    QUESTION,
    SHORT,
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


class VQAv2(SoftAccuracy):
    """Soft accuracy against ten human answers."""

    name = "vqav2"
    title = "VQAv2"
    folder = "vqav2"
    section = "vqav2"
    splits = ("test-dev", "val")
    suffix = SHORT
    metric = "soft accuracy after VQA normalisation (test-dev is scored by EvalAI's server)"
    columns: ClassVar[Columns] = {
        "id": ("question_id",),
        **QUESTION,
        "truth": ("answers",),
    }

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """From LLaVA's questions and COCO's test2015, or from VQA's own val files and val2014."""
        if self.split(source) == "val":
            return self._val(folder)
        questions = folder.find("llava_vqav2_mscoco_test-dev2015.jsonl", what="questions")
        everything = folder.find("llava_vqav2_mscoco_test2015.jsonl", what="questions of the whole test set")
        images = folder.find("test2015", folder=True, what="pictures of COCO")
        rows = list(folder.jsonl(questions, ("question_id", "image", "text")))
        whole = tuple(row["question_id"] for row in folder.jsonl(everything, ("question_id",)))
        return [
            Item(row["question_id"], row["text"], Picture(images / row["image"]), row["text"], extra={"whole": whole})
            for row in rows
        ]

    def _val(self, folder: Folder) -> list[Item]:
        questions = folder.find("v2_OpenEnded_mscoco_val2014_questions.json", what="questions")
        annotations = folder.find("v2_mscoco_val2014_annotations.json", what="truths")
        images = folder.find("val2014", folder=True, what="pictures of COCO")
        truths = {
            row["question_id"]: tuple(str(said["answer"]) for said in row["answers"])
            for row in folder.objects(
                annotations, folder.json(annotations, dict).get("annotations", []), ("question_id", "answers")
            )
        }
        rows = folder.json(questions, dict).get("questions", [])
        found = []
        for row in folder.objects(questions, rows, ("question_id", "image_id", "question")):
            if row["question_id"] not in truths:
                reason = f"{annotations.name} has no answers to this question"
                folder.reject(row["question_id"], reason)
                continue
            text = row["question"] + self.suffix
            image = Picture(images / f"COCO_val2014_{row['image_id']:012}.jpg")
            found.append(Item(row["question_id"], text, image, text, truths[row["question_id"]]))
        return found

    def row_item(self, source: Source, place: int, row: Row) -> Item:
        """The question of a row; test-dev has no answers."""
        text = str(self.cell(row, "text")) + self.suffix
        image = self.row_picture(source, place, row)
        said = row.get("answers") or None
        truth = said and tuple(str(one["answer"] if isinstance(one, dict) else one) for one in said)
        return Item(self.cell(row, "id"), text, image, text, truth)

    def write(self, answers: Sequence[Answer], out: Path, model: str) -> list[Path]:
        """LLaVA's answer file, and the upload: an answer to every question of the whole test set."""
        said = {answer.item.id: normalise(answer.text) for answer in answers}
        whole = answers[0].item.extra.get("whole", tuple(said)) if answers else ()
        rows = [{"question_id": number, "answer": said.get(number, "")} for number in whole]
        return [write_answers(answers, out, model), write_json(out / "upload.json", rows)]
