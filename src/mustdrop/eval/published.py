"""Published scores, each with the place where it was read. `mustdrop report` prints them beside measured ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from mustdrop.budget import Keep

# Score columns of the tables below -> benchmark names of `mustdrop eval`.
_COLUMNS = ("gqa", "mmbench", "mmbench-cn", "mme", "pope", "scienceqa", "vqav2", "textvqa", "vizwiz", "ocrbench")

# The same numbers stand in all of these; the paper of MustDrop itself was not at hand.
_LLAVA_1_5 = "re-printed alike in DART (arXiv 2502.11494) and HoloV (arXiv 2510.02912)"
_LLAVA_NEXT = "re-printed in DART (arXiv 2502.11494) and HoloV (arXiv 2510.02912)"

# LLaVA-1.5-7B of 576 tokens: tokens, method, then the columns. MME is perception + cognition, POPE is F1, ScienceQA is
# the image split, TextVQA has OCR tokens in the prompt.
_LLAVA_1_5_7B = """
576 none        61.9 64.7 58.1 1862 85.9 69.5 78.5 58.2 50.0 297
192 fastv       52.7 61.2 57.0 1612 64.8 67.3 67.1 52.5 50.8 291
192 sparsevlm   57.6 62.5 53.7 1721 83.6 69.1 75.6 56.1 50.5 292
192 pyramiddrop 57.1 63.2 56.8 1766 82.3 68.8 75.1 56.1 51.1 290
192 mustdrop    58.2 62.3 55.8 1787 82.6 69.2 76.0 56.5 51.4 289
128 fastv       49.6 56.1 56.4 1490 59.6 60.2 61.8 50.6 51.3 285
128 sparsevlm   56.0 60.0 51.1 1696 80.5 67.1 73.8 54.9 51.4 280
128 pyramiddrop 56.0 61.1 56.6 1644 82.3 68.3 72.9 55.1 51.0 287
128 mustdrop    56.9 61.1 55.2 1745 78.7 68.5 74.6 56.3 52.1 281
64  fastv       46.1 48.0 52.7 1256 48.0 51.1 55.0 47.8 50.8 245
64  sparsevlm   52.7 56.2 46.1 1505 75.1 62.2 68.2 51.8 50.1 180
64  pyramiddrop 41.9 33.3 50.5 1092 55.9 68.6 69.2 45.9 50.7 250
64  mustdrop    53.1 60.0 53.1 1612 68.0 63.4 69.3 54.2 51.2 267
"""

# LLaVA-NeXT-7B, "320 of 2880".
_LLAVA_NEXT_7B = """
2880 none        64.2 67.4 60.6 1851 86.5 70.1 81.8 64.9 57.6 517
320  fastv       55.9 61.6 51.9 1661 71.7 62.8 71.9 55.7 53.1 374
320  pyramiddrop 56.4 63.4 56.2 1663 77.6 67.5 73.5 54.4 54.1 259
320  sparsevlm   56.1 60.6 54.5 1533 82.4 66.1 71.5 58.4 52.0 270
320  mustdrop    57.3 62.8 55.1 1641 82.1 68.0 73.7 59.9 54.0 382
"""

# Model -> (words that its name must have, source, table).
_TABLES = {
    "LLaVA-1.5-7B": (("llava", "1.5-7b"), _LLAVA_1_5, _LLAVA_1_5_7B),
    "LLaVA-NeXT-7B": (("llava", "v1.6", "vicuna-7b"), _LLAVA_NEXT, _LLAVA_NEXT_7B),
}


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
def rows() -> tuple[Published, ...]:
    """All published scores that this package knows."""
    found = []
    for model, (_, source, table) in _TABLES.items():
        for line in table.strip().splitlines():
            tokens, method, *scores = line.split()
            found += [
                Published(model, method, int(tokens), benchmark, float(score), source)
                for benchmark, score in zip(_COLUMNS, scores, strict=True)
            ]
    return tuple(found)


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
        words = _TABLES[row.model][0]
        same = row.benchmark == benchmark and row.method == method and (method == "none" or row.tokens == keep)
        if same and all(word in name for word in words):
            return row
    return None
