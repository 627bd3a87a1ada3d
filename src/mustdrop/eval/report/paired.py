"""Two runs on the same questions: who is right where the other is not, and where a smaller picture would have done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Paired:
    """McNemar's exact test of two runs on the same questions.

    Attributes:
        gained: questions that the first answers rightly and the second does not.
        lost: questions that the second answers rightly and the first does not.
        p: of a split as uneven as this one or more, if each such question fell to either side with equal chance.
    """

    gained: int
    lost: int
    p: float

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON; `p` to four digits."""
        return asdict(self) | {"p": float(f"{self.p:.4g}")}


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p of the exact test; 1 where no question tells the two apart.

    Args:
        gained: questions that only the first answers rightly.
        lost: questions that only the second answers rightly.
    """
    number = gained + lost
    tail = sum(math.comb(number, k) for k in range(min(gained, lost) + 1))
    return min(1.0, tail / 2 ** (number - 1)) if number else 1.0


def paired(one: Sequence[bool], other: Sequence[bool]) -> Paired:
    """Compare two runs.

    Args:
        one: for each question, whether the first is right.
        other: the same of the second, in the same order.
    """
    pairs = list(zip(one, other, strict=True))
    gained, lost = sum(bool(a and not b) for a, b in pairs), sum(bool(b and not a) for a, b in pairs)
    return Paired(gained, lost, mcnemar(gained, lost))


@dataclass(frozen=True)
class Groups:
    """Questions that the unpruned model answers rightly, by whether a smaller picture would have done.

    VTC-Bench (arXiv 2510.07143) calls the hard ones A and the easy ones B.

    Attributes:
        hard: number of questions in A: low resolution is not enough.
        hard_right: how many of them the run answers rightly.
        easy: number of questions in B: low resolution is enough.
        easy_right: how many of them the run answers rightly.
    """

    hard: int
    hard_right: int
    easy: int
    easy_right: int

    @property
    def shares(self) -> tuple[float | None, float | None]:
        """Accuracy on A and on B; None where a group is empty."""
        return (
            self.hard_right / self.hard if self.hard else None,
            self.easy_right / self.easy if self.easy else None,
        )


def groups(run: Sequence[bool], unpruned: Sequence[bool], downsampled: Sequence[bool]) -> Groups:
    """Split the questions by what the unpruned model and a smaller picture answer.

    Args:
        run: for each question, whether the run in question is right.
        unpruned: the same of the unpruned model; what it gets wrong says nothing about pruning, and is left out.
        downsampled: the same of the unpruned model on pictures of as many tokens as the run keeps.
    """
    rows = [(bool(r), bool(d)) for r, u, d in zip(run, unpruned, downsampled, strict=True) if u]
    hard, easy = [r for r, d in rows if not d], [r for r, d in rows if d]
    return Groups(len(hard), sum(hard), len(easy), sum(easy))
