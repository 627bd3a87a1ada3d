"""The folder of a fit: where it stands, its log, and the best scorer so far."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mustdrop.errors import ConfigError

STATE, LOG = "state.pt", "log.jsonl"


@dataclass
class State:
    """How far a fit is; all that decides how it goes on, besides its settings and samples.

    Attributes:
        weights: of the scorer.
        optimizer: state of the optimizer.
        step: steps done.
        best: lowest divergence on the held-out part so far; None before the first look.
        best_step: the step it was seen at.
        best_weights: of the scorer at that step.
        waited: looks without a better result.
        ended: why it is over; empty while it is not.
        answers: sample -> tokens of the unpruned answer.
        skipped: sample -> why it was left out.
        losses: divergence in training since the last look, one per prompt.
        log: a line per look.
        coverage: of the best scorer, once it is over.
        covered: exponent -> divergence at each budget; empty until it is over.
    """

    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    step: int = 0
    best: float | None = None
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    waited: int = 0
    ended: str = ""
    answers: dict[int, list[int]] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    coverage: float = 0.0
    covered: dict[str, list[float]] = field(default_factory=dict)


def write(folder: Path, state: State, mark: dict[str, Any]) -> None:
    """Write where a fit stands, in one piece.

    Args:
        folder: of the fit.
        state: what is written.
        mark: settings and samples that it belongs to.
    """
    part = folder / f"{STATE}.part"
    torch.save({"mark": mark, **vars(state)}, part)
    part.replace(folder / STATE)
    lines = "".join(json.dumps(line) + "\n" for line in state.log)
    (folder / LOG).write_text(lines, encoding="utf-8")


def read(folder: Path, mark: dict[str, Any]) -> State | None:
    """Where the fit of a folder stands; None where none was begun.

    Raises:
        ConfigError: the folder holds another fit, or a file that cannot be read.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        told = torch.load(path, map_location="cpu", weights_only=True)
        before = told.pop("mark")
        state = State(**told)
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): delete it, or give another folder, to start anew."
        ) from error
    other = [name for name in {**before, **mark} if before.get(name) != mark.get(name)]
    if other:
        shown = ", ".join(f"{name}={before.get(name)!r} (now {mark.get(name)!r})" for name in sorted(other))
        raise ConfigError(
            f"{folder} holds another fit: {shown}. Go on with those settings, delete {path}, or give another folder."
        )
    return state
