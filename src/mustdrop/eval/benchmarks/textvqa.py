"""TextVQA (arXiv 1904.08920), with the OCR tokens in the prompt that LLaVA's question file has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mustdrop.eval.benchmark import SHORT, Answer, Benchmark, Columns, Item, Source, percent, write_answers
from mustdrop.eval.files import Folder, Row
from mustdrop.eval.media import Column, Picture
from mustdrop.eval.result import Failure
from mustdrop.eval.vqa import soft_accuracy

_HINT = "Reference OCR token:"


def question_of(prompt: str) -> str | None:
    """The question inside a prompt, lower case, as LLaVA's scorer takes it out; None if it has another form."""
    lines = prompt.split("\n")
    if _HINT in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(_HINT) else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


class TextVQA(Benchmark):
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
        "image": ("image",),
        "text": ("question",),
        "truth": ("answers",),
        "tokens": ("ocr_tokens",),
    }

    def items(self, source: Source, folder: Folder) -> list[Item]:
        """From LLaVA's questions with OCR tokens and TextVQA's validation annotations, or from rows."""
        if source.rows is not None:
            return [self._from_row(source, i, row) for i, row in enumerate(source.rows)]
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
                folder.broken.append(Failure(name=f"{row['question_id']}: {row['text']!r}", reason=reason))
                continue
            found.append(
                Item(row["question_id"], row["text"], Picture(images / row["image"]), row["text"], tuple(truth))
            )
        return found

    def _from_row(self, source: Source, i: int, row: Row) -> Item:
        tokens = ", ".join(self.cell(row, "tokens"))
        text = f"{self.cell(row, 'text')}\n{_HINT} {tokens}{self.suffix}"
        image = Column(source.rows, i, self.column(row, "image"))
        return Item(self.cell(row, "id"), text, image, text, tuple(self.cell(row, "truth")))

    def credit(self, answer: Answer) -> float:
        """Soft accuracy of one answer."""
        return 0.0 if answer.failed else soft_accuracy(answer.text, answer.item.truth)

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Mean soft accuracy in percent."""
        return {"accuracy": percent([self.credit(answer) for answer in answers])}

    def write(self, answers: Sequence[Answer], out: Path, model: str) -> list[Path]:
        """LLaVA's answer file, which its scorer reads."""
        return [write_answers(answers, out, model)]
