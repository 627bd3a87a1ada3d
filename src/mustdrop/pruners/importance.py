"""What makes a feature important by itself, for rules that weigh it against how the chosen ones differ."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mustdrop.errors import ConfigError
from mustdrop.pruners.base import Settings
from mustdrop.pruners.vision_rules import LAST, Features, Read
from mustdrop.rules.diversity import unit
from mustdrop.rules.geometry import distinctiveness
from mustdrop.rules.scores import min_max

Space = Literal["encoder", "language"]


class Importance(Settings):
    """Base of importances: subclass, and write `score`.

    Attributes:
        asks: whether the words of the question are read.
        space: which features `score` reads: those of the "encoder", or those that enter the "language" model; None
            where it reads none, or either.
    """

    asks: ClassVar[bool] = False
    space: ClassVar[Space | None] = "language"

    @property
    def reads(self) -> tuple[Read, ...]:
        """What is read from the encoder."""
        return ()

    def score(self, seen: Features) -> Tensor:
        """(B, N), higher is more important; only the order and the ratios of differences within a view count."""
        raise NotImplementedError

    def positive(self, seen: Features) -> Tensor:
        """(B, N) from 0 up, for rules that multiply with it: `score`, spread from 0 to 1 in each view."""
        return min_max(self.score(seen).float())

    def bound(self, model: nn.Module) -> Importance:
        """The importance for one model; itself, unless it comes with the model."""
        return self


class Attention(Importance):
    """What CLS gives to a feature or, in an encoder without CLS, what it receives on average."""

    space: ClassVar[Space | None] = None

    @property
    def reads(self) -> tuple[Read, ...]:
        """Attention of the layer that features are read from."""
        return (Read(what="attention", **LAST),)

    def score(self, seen: Features) -> Tensor:
        """See `Importance.score`."""
        return seen.of(self.reads[0])

    def positive(self, seen: Features) -> Tensor:
        """The attention as it is: it is never negative."""
        return self.score(seen)


class Question(Importance):
    """The mean cosine of a feature with the words of the question."""

    asks: ClassVar[bool] = True

    def score(self, seen: Features) -> Tensor:
        """See `Importance.score`."""
        return relevance(seen.values, seen.question)


class Distinct(Importance):
    """How unlike all other features it is on average."""

    space: ClassVar[Space | None] = None

    def score(self, seen: Features) -> Tensor:
        """See `Importance.score`."""
        return distinctiveness(seen.values, "centered")


def relevance(values: Tensor, question: tuple[Tensor, ...]) -> Tensor:
    """(B, N), the mean cosine of features (B, N, C) with the words, per view (T, C); 0 where there are no words.

    Raises:
        ConfigError: there is not one question per view, or its width is another.
    """
    check_question(values, question)
    if len({len(words) for words in question}) == 1:
        mean = unit(torch.stack(question)).sum(1) / max(1, len(question[0]))
    else:
        mean = torch.stack([unit(words).sum(0) / max(1, len(words)) for words in question])
    return (unit(values) @ mean[..., None])[..., 0]


def check_question(values: Tensor, question: tuple[Tensor, ...]) -> None:
    """Raise `ConfigError` unless there is one question per view, as wide as the features (B, N, C)."""
    widths = {words.shape[-1] for words in question}
    if len(question) != len(values) or widths - {values.shape[2]}:
        raise ConfigError(
            f"expected embeddings of a question (words, {values.shape[2]}) for each of {len(values)} views, got "
            f"{[tuple(words.shape) for words in question]}: pass them as Features(question=...)."
        )


class OfField:
    """A class attribute that an object has from one of its fields."""

    def __init__(self, field: str, name: str, otherwise: Any) -> None:
        self.field, self.name, self.otherwise = field, name, otherwise

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        found = None if owner is None else getattr(getattr(owner, self.field), self.name, None)
        return self.otherwise if found is None else found
