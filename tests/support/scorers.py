"""Scorers for tiny models: random ones, in the folder that the model says it comes from."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from mustdrop.adapters import find
from mustdrop.pruners.scored import FOLDER
from mustdrop.pruners.scorer import Scorer, save


@functools.cache
def home(width: int) -> tempfile.TemporaryDirectory[str]:
    """A folder with a scorer for models of a width; it is gone when the process ends."""
    made = tempfile.TemporaryDirectory(prefix="mustdrop-tests-")
    state = torch.get_rng_state()
    torch.manual_seed(width)
    save(Scorer(width, rank=8), Path(made.name) / FOLDER)
    torch.set_rng_state(state)
    return made


def given(model: Any) -> Any:
    """The model, which comes with a scorer from now on: so the method `learned` works by its name."""
    model.name_or_path = home(find(model).text(model).get_input_embeddings().weight.shape[1]).name
    return model
