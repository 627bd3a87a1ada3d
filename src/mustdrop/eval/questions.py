"""What was said to each question, beside the result file, so that two runs can be compared question by question."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mustdrop.errors import DataFileError

QUESTIONS = "questions.jsonl"  # its name in the folder of a run


@dataclass(frozen=True)
class Told:
    """A question, what was said to it, and what that took.

    Attributes:
        id: of the question, as its file has it.
        category: what the benchmark splits its scores by; may be empty.
        ability: what the question asks for, in words that benchmarks share ("reading", "counting", ...).
        text: the answer; empty where the question could not be asked.
        credit: how right it is, 0 to 1; None where only a server knows.
        prompt_tokens: tokens of the prompt that a decoder layer processed, mean over the layers; None where it failed.
        tokens: tokens of the answer, with the one that ends it.
        flops: of the whole answer, the prompt's among them.
    """

    id: str
    category: str
    ability: str
    text: str
    credit: float | None
    prompt_tokens: float | None
    tokens: int | None
    flops: float | None


def write(path: Path, told: Iterable[Told]) -> None:
    """Write one line for each question, in the order in which they were asked."""
    lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in told)
    path.write_text("".join(lines), encoding="utf-8")


def read(folder: Path) -> list[Told] | None:
    """The questions of a run; None where its folder has no such file (runs of older versions have none).

    Raises:
        DataFileError: the file is not what `write` writes.
    """
    path = folder / QUESTIONS
    if not path.exists():
        return None
    try:
        return [Told(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (TypeError, ValueError) as error:
        raise DataFileError(
            f"{path} is not what `mustdrop eval` writes ({error}): give the same `eval` command once more, which "
            "writes it anew from the answers that are there."
        ) from None
