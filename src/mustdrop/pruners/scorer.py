"""A small trained module that says how important each feature is, and its folder of two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from mustdrop.errors import ConfigError

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "scorer.safetensors"
_RANK, _ROOM = 128, 120_000  # so that five maps from a model's width have half a million weights at most


class Scorer(nn.Module):
    """A perceptron on each feature, on the mean of its picture's features and, if it asks, on the question.

    Features and words are brought to mean 0 and variance 1 over their channels first, so that one rate of learning does
    for all models.

    Attributes:
        width: C, channels of the features that enter the language model.
        rank: width of the perceptron.
        asks: whether it reads the question.
        coverage: how the method `learned` uses its scores, unless it is told: see there.
    """

    def __init__(self, width: int, rank: int | None = None, asks: bool = False, coverage: float = 0.0) -> None:
        super().__init__()
        self.width, self.asks, self.coverage = width, asks, coverage
        self.rank = max(8, min(_RANK, _ROOM // width)) if rank is None else rank
        self.token = nn.Linear(width, self.rank)
        self.context = nn.Linear(width, self.rank, bias=False)
        if asks:
            self.asked = nn.Linear(width, self.rank, bias=False)
            self.matched = nn.Linear(width, self.rank, bias=False)
        self.hidden = nn.Linear(self.rank, self.rank)
        self.out = nn.Linear(self.rank, 1)

    def forward(self, features: Tensor, question: Tensor | None = None) -> Tensor:
        """(B, N) scores of features (B, N, C); higher is more important.

        Args:
            features: of B pictures.
            question: (B, C) the mean embedding of the question's words, where `asks`.

        Raises:
            ConfigError: another width, or no question where one is read.
        """
        if features.ndim != 3 or features.shape[2] != self.width:
            raise ConfigError(
                f"this scorer reads features (B, N, {self.width}), got {tuple(features.shape)}: it was fitted to "
                "another model. Train one for this model with `mustdrop fit`."
            )
        x = layer_norm(features, (self.width,))
        h = self.token(x) + self.context(x.mean(1, keepdim=True))
        if self.asks:
            if question is None:
                raise ConfigError(f"this scorer reads the question: pass question=, (B, {self.width}), with features.")
            words = layer_norm(question, (self.width,))[:, None]
            h = h * (1 + self.matched(words)) + self.asked(words)
        h = gelu(h)
        h = h + gelu(self.hidden(h))
        return self.out(h)[..., 0]  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """What a print shows beside the layers."""
        return f"width={self.width}, rank={self.rank}, asks={self.asks}"


def save(scorer: Scorer, folder: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a scorer: weights in half precision (scorer.safetensors), sizes and provenance (config.json).

    Args:
        scorer: what is written.
        folder: is made where it is missing.
        about: what else its reader should know; it must be JSON.
    """
    where = Path(folder)
    where.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to("cpu", torch.float16).contiguous() for name, value in scorer.state_dict().items()
    }
    part = where / f"{WEIGHTS}.part"
    save_file(weights, part)
    part.replace(where / WEIGHTS)
    facts = {"width": scorer.width, "rank": scorer.rank, "asks": scorer.asks, "coverage": scorer.coverage}
    text = json.dumps({"format": FORMAT, **facts, "about": dict(about or {})}, indent=1)
    (where / CONFIG).write_text(text + "\n", encoding="utf-8")


def load(folder: str | Path) -> Scorer:
    """The scorer of a folder, in float32 and on the CPU.

    Args:
        folder: that `mustdrop fit` or `save` wrote.

    Raises:
        ConfigError: a file is missing or broken, of another format, or holds numbers that are not finite.
    """
    where = Path(folder)
    told = sizes(where)
    scorer = Scorer(told["width"], told["rank"], told["asks"], told["coverage"])
    try:
        weights = load_file(where / WEIGHTS)
        scorer.load_state_dict({name: value.float() for name, value in weights.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(
            f"the scorer in {where} cannot be read: expected {WEIGHTS} with the weights that {CONFIG} describes, got: "
            f"{why} Write it again with `mustdrop fit`."
        ) from error
    broken = [name for name, value in scorer.named_parameters() if not bool(value.isfinite().all())]
    if broken:
        raise ConfigError(
            f"the scorer in {where} holds numbers that are not finite, in {', '.join(broken)}: train it again with "
            "`mustdrop fit`."
        )
    return scorer.eval().requires_grad_(False)


def sizes(folder: str | Path) -> dict[str, Any]:
    """What config.json of a scorer's folder says, looked at.

    Raises:
        ConfigError: there is no such folder or file, or it says something else.
    """
    where = Path(folder)
    expected = f"expected a folder with {CONFIG} and {WEIGHTS}, as `mustdrop fit` writes it"
    try:
        told = json.loads((where / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"there is no scorer at {str(where)!r} ({error.strerror}): {expected}.") from error
    except ValueError as error:
        raise ConfigError(f"{where / CONFIG} is not JSON ({error}): {expected}.") from error
    wanted = {"format": int, "width": int, "rank": int, "asks": bool, "coverage": float}
    fits = isinstance(told, dict) and all(type(told.get(name)) is kind for name, kind in wanted.items())
    if not fits or told["format"] != FORMAT or min(told["width"], told["rank"]) < 1 or told["coverage"] < 0:
        shown = {name: told.get(name) for name in wanted} if isinstance(told, dict) else told
        raise ConfigError(
            f"{where / CONFIG}: expected format {FORMAT}, width, rank, asks and coverage of a scorer, got {shown!r}; "
            f"{expected}."
        )
    found: dict[str, Any] = told
    return found
