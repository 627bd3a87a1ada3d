"""What makes a feature important by itself, for rules that weigh it against how the chosen ones differ."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from mustdrop.errors import ConfigError
from mustdrop.pruners.base import Settings
from mustdrop.pruners.compared_features import LAST
from mustdrop.pruners.vision_rules import Features, Read
from mustdrop.rules.diversity import unit
from mustdrop.rules.geometry import distinctiveness


class Importance(Settings):
    """Base of importances: subclass, and write `score`.

    Attributes:
        asks: whether the words of the question are read.
    """

    asks: ClassVar[bool] = False

    @property
    def reads(self) -> tuple[Read, ...]:
        """What is read from the encoder."""
        return ()

    def score(self, seen: Features) -> Tensor:
        """(B, N), higher is more important; only the order and the ratios of differences within a view count."""
        raise NotImplementedError


class Attention(Importance):
    """What CLS gives to a feature or, in an encoder without CLS, what it receives on average."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """Attention of the layer that features are read from."""
        return (Read(what="attention", **LAST),)

    def score(self, seen: Features) -> Tensor:
        """See `Importance.score`."""
        return seen.of(self.reads[0])


class Question(Importance):
    """The mean cosine of a feature with the words of the question."""

    asks: ClassVar[bool] = True

    def score(self, seen: Features) -> Tensor:
        """See `Importance.score`."""
        return relevance(seen.values, seen.question)


class Distinct(Importance):
    """How unlike all other features it is on average."""

    def score(self, seen: Features) -> Tensor:
        """See `Importance.score`."""
        return distinctiveness(seen.values, "centered")


Named = Literal["attention", "question", "distinct"]
_NAMED: dict[str, type[Importance]] = {"attention": Attention, "question": Question, "distinct": Distinct}


def importance_of(given: Named | Importance) -> Importance:
    """The object that a name stands for; an object is itself."""
    return _NAMED[given]() if isinstance(given, str) else given


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
