"""Prompts at the edge: media at the very end, and the budgets that a method can meet in a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mustdrop import budget
from mustdrop.adapters import registry
from mustdrop.method import find
from mustdrop.method import registry as recipes

from .builders import answer
from .families import PAD, plain, vision_positions

#: Methods that have a budget.
BUDGETED = [name for name, recipe in recipes().items() if "keep" in recipe.model_fields]


def share(method: str, family: str) -> float:
    """A budget that the filters of the method can meet in a tiny model, with something left to drop."""
    prefill = find(method).prefill
    if prefill is None:
        return 0.5
    depth = len(registry()[family].decoder_layers(plain(family)))
    first = budget.spans(depth, prefill.filter_layers(depth))[0]
    return (first / depth + 1) / 2


def cut_behind_media(model: Any, inputs: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The same inputs with nothing after the last vision token of some rows, padded on the left; all end at the end."""
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    ends = {row: int(vision_positions(model, ids, row)[-1]) + 1 for row in rows}
    moved = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            continue
        moved[name] = value.clone()
        for row, end in ends.items():
            moved[name][row] = value[row].roll(length - end)
            moved[name][row, : length - end] = PAD if name == "input_ids" else 0
    start = int((moved["attention_mask"].cumsum(1) == 0).sum(1).min())  # columns that are padding in all rows
    return {
        name: value[:, start:] if isinstance(value, Tensor) and value.shape == ids.shape else value
        for name, value in moved.items()
    }


def skip_where_the_plain_model_fails(name: str, inputs: dict[str, Any]) -> None:
    """Skip a test of a prompt at the edge that transformers cannot run."""
    try:
        answer(plain(name), inputs, 0)
    except (RuntimeError, ValueError, IndexError) as error:
        pytest.skip(f"the unpatched model raises: {str(error)[:100]}")


def ends_with_media(model: Any, inputs: dict[str, Any]) -> Tensor:
    """(B,) bool, whether the last token of each row is a vision token."""
    ids = inputs["input_ids"]
    where = [vision_positions(model, ids, row).tolist() for row in range(len(ids))]
    return torch.tensor([ids.shape[1] - 1 in places for places in where])
