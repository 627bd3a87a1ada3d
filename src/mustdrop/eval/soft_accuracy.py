"""What TextVQA, VQAv2 and VizWiz share: a score against the answers of ten people."""

from __future__ import annotations

from collections.abc import Sequence

from mustdrop.eval.benchmark import Answer, Benchmark, percent
from mustdrop.eval.vqa import soft_accuracy


class SoftAccuracy(Benchmark):
    """Base of the benchmarks that score by soft accuracy against ten human answers."""

    def credit(self, answer: Answer) -> float | None:
        """Soft accuracy of one answer; None where only the server knows."""
        if answer.item.truth is None:
            return None
        return 0.0 if answer.failed else soft_accuracy(answer.text, answer.item.truth)

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Mean soft accuracy in percent; nothing where only the server can say."""
        known = [credit for answer in answers if (credit := self.credit(answer)) is not None]
        return {"accuracy": percent(known)} if known else {}
