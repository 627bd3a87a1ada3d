"""Published scores, each with the place where it was read. `mustdrop report` prints them beside measured ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mustdrop.budget import Keep

# Model -> the words that its name has, where its table was read, the benchmarks of its columns, and rows of tokens,
# method and scores. MME is perception + cognition, POPE is F1, ScienceQA is the image split, TextVQA has OCR tokens in
# the prompt. The paper of MustDrop itself was not at hand; later papers print its numbers alike.
_FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class Published:
    """One published score.

    Attributes:
        model: name of the model.
        method: name of the method as this package writes it; "none" is the unpruned model.
        tokens: budget of the row.
        benchmark: name of the benchmark.
        score: the headline.
        source: where it was read.
    """

    model: str
    method: str
    tokens: int
    benchmark: str
    score: float
    source: str


@cache
def _tables() -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return tables


@cache
def rows() -> tuple[Published, ...]:
    """All published scores that this package knows."""
    return tuple(
        Published(model, method, tokens, benchmark, float(score), table["source"])
        for model, table in _tables().items()
        for tokens, method, *scores in table["rows"]
        for benchmark, score in zip(table["columns"], scores, strict=True)
    )


def published(benchmark: str, model: str, method: str, keep: Keep | None) -> Published | None:
    """The published score of a set-up, or None where none is known.

    Args:
        benchmark: name of the benchmark.
        model: hub id or folder, e.g. "llava-hf/llava-1.5-7b-hf".
        method: name of the method.
        keep: budget in tokens; for "none" it does not matter.
    """
    name = model.lower()
    for row in rows():
        words = _tables()[row.model]["words"]
        same = row.benchmark == benchmark and row.method == method and (method == "none" or row.tokens == keep)
        if same and all(word in name for word in words):
            return row
    return None
