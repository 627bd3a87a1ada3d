"""Importance by a module: one's own, a saved scorer, or the scorer that comes with a model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mustdrop.errors import ConfigError
from mustdrop.pruners import answers, scorer
from mustdrop.pruners.importance import Importance, OfField, check_question
from mustdrop.pruners.vision_rules import Features

#: Name of the folder, within a model's own, of the scorer that comes with it.
FOLDER = "scorer"
_HOW = (
    "Train one on your own pictures, `mustdrop fit --model MODEL --samples FILE --out FOLDER`, and give it: "
    "importance=FOLDER."
)

_copies: WeakKeyDictionary[nn.Module, dict[torch.device, nn.Module]] = WeakKeyDictionary()


class Scored(Importance):
    """What a module says: features (B, N, C) that enter the language model in, a number per feature (B, N) out.

    It runs without gradients, in the type of its own weights. Where the features lie on another device than its
    weights, a copy of it runs there, made when it is first needed.

    Attributes:
        module: the module. One with a true attribute `asks` is called with the mean embedding (B, C) of the question's
            words as well.
        folder: where it was loaded from, or None.
    """

    asks: ClassVar[bool] = cast(bool, OfField("module", "asks", False))
    module: Any
    folder: str | None = None

    def __repr__(self) -> str:
        return f"Scored({self.folder or type(self.module).__name__!s})"

    def score(self, seen: Features) -> Tensor:
        """See `Importance.score`.

        Raises:
            ConfigError: the module fails, or answers something else than a finite number per feature.
        """
        values = seen.values
        module, dtype = _placed(self.module, values)
        given = [values.to(dtype)]
        if self.asks:
            check_question(values, seen.question)
            given.append(mean_words(seen.question, values).to(dtype))
        try:
            with torch.no_grad():
                got = module(*given)
        except (torch.OutOfMemoryError, ConfigError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"importance={self!r} failed on features of shape {tuple(values.shape)}: {str(error).splitlines()[0]}. "
                "Expected a module that takes (B, N, C) and returns one number per feature, (B, N); for a scorer that "
                "fits this model run `mustdrop fit`."
            ) from error
        return answers.module_scores(self.module, got, values).float()


class FromModel(Importance):
    """The scorer that comes with a model: the folder `scorer` in the folder that the model was loaded from."""

    def score(self, seen: Features) -> Tensor:
        """Raises: `patch` puts the model's scorer in its place."""
        raise ConfigError(f"no scorer was given, and there is no model that one comes with. {_HOW}")

    def bound(self, model: nn.Module) -> Importance:
        """The model's scorer.

        Raises:
            ConfigError: the model comes with none.
        """
        source = str(getattr(model, "name_or_path", "") or "")
        folder = Path(source) / FOLDER
        if not source or not folder.is_dir():
            looked = f" (looked for {folder})" if source else ""
            raise ConfigError(f"{type(model).__name__} comes without a scorer{looked}. {_HOW}")
        return loaded(str(folder))


def _placed(module: nn.Module, values: Tensor) -> tuple[nn.Module, torch.dtype]:
    """The module, or a copy of it where the features are, and the type of its weights."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = values.dtype if weight is None else weight.dtype
    if weight is None or weight.device == values.device:
        return module, dtype
    known = _copies.setdefault(module, {})
    if values.device not in known:
        with torch.inference_mode(False):  # a later call may train
            known[values.device] = copy.deepcopy(module).to(values.device)
    return known[values.device], dtype


def mean_words(question: tuple[Tensor, ...], values: Tensor) -> Tensor:
    """(B, C) float32, mean embedding of each view's words (T, C); zeros where there are no words."""
    if len({len(words) for words in question}) == 1:
        return torch.stack(question).float().sum(1) / max(1, len(question[0]))
    return torch.stack([words.float().sum(0) / max(1, len(words)) for words in question])


def loaded(folder: str) -> Scored:
    """The importance that the scorer of a folder gives.

    Raises:
        ConfigError: see `mustdrop.pruners.scorer.load`.
    """
    return Scored(module=scorer.load(folder), folder=folder)
