"""GQA (arXiv 1902.09506), the balanced test-dev split."""

from __future__ import annotations

from collections.abc import Sequence
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
    percent,
    write_answers,
    write_json,
)
from mustdrop.eval.data_files import Folder
from mustdrop.eval.media import Picture

_OPEN = "query"  # questions of this structure have open answers, all others are yes/no or a choice


def prediction(text: str) -> str:
    """An answer as GQA's scorer compares it: without a period at its end, in lower case."""
    return text.rstrip(".").lower()


class GQA(Benchmark):
    """Exact match."""

    name = "gqa"
    title = "GQA"
    folder = "gqa"
    section = "gqa"
    suffix = SHORT
    metric = "exact match, test-dev balanced"
    columns: ClassVar[Columns] = {
        "id": ("question_id", "id", "questionId"),
        **QUESTION,
    }

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """From LLaVA's questions, GQA's questions with their answers and GQA's pictures."""
        questions = folder.find("llava_gqa_testdev_balanced.jsonl", what="questions")
        names = [f"{place}testdev_balanced_questions.json" for place in ("data/", "data/questions1.2/", "")]
        annotations = folder.find(*names, what="truths")
        images = folder.find("data/images", "images", folder=True, what="pictures")
        truths = folder.json(annotations, dict)
        found = []
        for row in folder.jsonl(questions, ("question_id", "image", "text")):
            truth = truths.get(str(row["question_id"]))
            if not isinstance(truth, dict) or "answer" not in truth:
                reason = f"{annotations.name} has no answer to this question"
                folder.reject(row["question_id"], reason)
                continue
            kind = "open" if truth.get("types", {}).get("structural") == _OPEN else "binary"
            image = Picture(images / row["image"])
            found.append(
                Item(
                    row["question_id"],
                    row["text"],
                    image,
                    row["text"],
                    truth["answer"],
                    kind if "types" in truth else "",
                )
            )
        return found

    def credit(self, answer: Answer) -> float:
        """Whether the answer is the expected word."""
        return float(not answer.failed and prediction(answer.text) == answer.item.truth)

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Accuracy of all, of yes/no and choices ("binary"), and of open questions."""
        found = {"accuracy": percent([self.credit(answer) for answer in answers])}
        for kind in ("binary", "open"):
            group = [self.credit(answer) for answer in answers if answer.item.category == kind]
            if group:
                found[kind] = percent(group)
        return found

    def write(self, answers: Sequence[Answer], out: Path, model: str) -> list[Path]:
        """LLaVA's answer file, and the predictions that GQA's `eval.py` reads."""
        rows = [{"questionId": answer.item.id, "prediction": prediction(answer.text)} for answer in answers]
        return [write_answers(answers, out, model), write_json(out / "testdev_balanced_predictions.json", rows)]
