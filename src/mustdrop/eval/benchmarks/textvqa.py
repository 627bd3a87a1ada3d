"""TextVQA (arXiv 1904.08920), with the OCR tokens in the prompt that LLaVA's question file has."""

from __future__ import annotations

from typing import ClassVar

from mustdrop.eval.benchmark import QUESTION, SHORT, Columns, Item, Source
from mustdrop.eval.data_files import Folder, Row
from mustdrop.eval.media import Picture
from mustdrop.eval.soft_accuracy import SoftAccuracy

_HINT = "Reference OCR token:"


def question_of(prompt: str) -> str | None:
    """The question inside a prompt, lower case, as LLaVA's scorer takes it out; None if it has another form."""
    lines = prompt.split("\n")
    if _HINT in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(_HINT) else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


class TextVQA(SoftAccuracy):
    """Soft accuracy against ten human answers."""

    name = "textvqa"
    title = "TextVQA"
    folder = "textvqa"
    section = "textvqa"
    suffix = SHORT
    metric = "soft accuracy after VQA normalisation, OCR tokens in the prompt"
    general = "reading"
    columns: ClassVar[Columns] = {
        "id": ("image_id",),
        **QUESTION,
        "truth": ("answers",),
        "tokens": ("ocr_tokens",),
    }

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """From LLaVA's questions with OCR tokens and TextVQA's validation annotations."""
        questions = folder.find("llava_textvqa_val_v051_ocr.jsonl", what="questions")
        annotations = folder.find("TextVQA_0.5.1_val.json", what="truths")
        images = folder.find("train_images", "train_val_images/train_images", folder=True, what="pictures")
        data = folder.json(annotations, dict).get("data", [])
        entries = folder.objects(annotations, data, ("image_id", "question", "answers"))
        truths = {(row["image_id"], row["question"].lower()): row["answers"] for row in entries}
        found = []
        for row in folder.jsonl(questions, ("question_id", "image", "text")):
            truth = truths.get((row["question_id"], question_of(row["text"]) or ""))
            if truth is None:
                reason = f"{annotations.name} has no such question about this picture"
                folder.reject(f"{row['question_id']}: {row['text']!r}", reason)
                continue
            found.append(
                Item(row["question_id"], row["text"], Picture(images / row["image"]), row["text"], tuple(truth))
            )
        return found

    def row_item(self, source: Source, place: int, row: Row) -> Item:
        """The question of a row with its OCR tokens."""
        tokens = ", ".join(self.cell(row, "tokens"))
        text = f"{self.cell(row, 'text')}\n{_HINT} {tokens}{self.suffix}"
        image = self.row_picture(source, place, row)
        return Item(self.cell(row, "id"), text, image, text, tuple(self.cell(row, "truth")))
