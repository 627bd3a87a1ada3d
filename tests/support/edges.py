"""Prompts at the edge: media at the very end, and the budgets that a method can meet in a tiny model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mustdrop import budget
from mustdrop.adapters import registry
from mustdrop.method import find
from mustdrop.method import registry as recipes
from mustdrop.pruners import PictureRule
from mustdrop.stages import missing
from tests.families import fixture_of

from .builders import answer
from .families import PAD, batch, plain, vision_positions

#: Methods that have a budget.
BUDGETED = [name for name, recipe in recipes().items() if "keep" in recipe.model_fields]


def refusal(method: str, family: str) -> str:
    """What the error says where a family lacks what the method needs; empty if it lacks nothing."""
    adapter, built = registry()[family], find(method, keep=0.5)
    gone = missing(built, adapter)
    if gone:
        return f"no {next(iter(gone))} stage"
    resizes = built.vision is not None and isinstance(built.vision.rule, PictureRule)
    return "resizes pictures" if resizes and adapter.fixed_pictures else ""


def share(method: str, family: str) -> float:
    """A budget that the filters of the method can meet in a tiny model, with something left to drop."""
    built = find(method)
    prefill = built.prefill
    if prefill is None and built.vision is None:
        return 0.25  # of a cache: layers with a window hold less than half anyway, and leave the others their share
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


def with_sizes(adapter: Any, kind: str, sizes: Sequence[Sequence[int]]) -> Any:
    """The fixture, whose tiny media of one kind have other shapes; the r-th row's first medium has the r-th."""
    usual = fixture_of(adapter)
    other = copy.copy(usual)
    other.sizes = lambda of: tuple(map(tuple, sizes)) if of == kind else usual.sizes(of)
    return other


@functools.cache
def small_sizes(name: str, kind: str) -> tuple[tuple[int, ...], ...]:
    """Shapes of small and thin media that a family turns into fewer tokens; empty where all become equally many.

    The smallest, a wide one and a tall one, as far as the unpatched model runs them.
    """
    adapter, model = registry()[name], plain(name)
    usual = fixture_of(adapter).sizes(kind)[0]
    most = tokens_of_size(adapter, model, kind, usual)
    shapes = [(unit * r, unit * c) for unit in (4, 8, 16) for r, c in ((1, 1), (1, 2), (1, 5), (5, 1))]
    made = {(*usual[:-2], *shape): tokens_of_size(adapter, model, kind, (*usual[:-2], *shape)) for shape in shapes}
    fewer = sorted((n, size) for size, n in made.items() if 0 < n < most)
    ordered = {
        "small": [size for _, size in fewer],
        "wide": [size for _, size in fewer[::-1] if size[-1] > 2 * size[-2]],
        "tall": [size for _, size in fewer[::-1] if size[-2] > 2 * size[-1]],
    }
    run = functools.cache(functools.partial(_runs, name, kind))
    found = [next((size for size in sizes if run(size)), None) for sizes in ordered.values()]
    return tuple(dict.fromkeys(size for size in found if size is not None))


#: What families raise for shapes that their processors would not hand on.
_REFUSED = (RuntimeError, ValueError, LookupError, AssertionError, ZeroDivisionError, TypeError)


def _runs(name: str, kind: str, size: Sequence[int]) -> bool:
    """Whether the unpatched model runs a medium of a shape, alone and beside a usual one."""
    adapter, model = registry()[name], plain(name)
    try:
        for sizes in ((size,), (size, fixture_of(adapter).sizes(kind)[0])):
            answer(model, batch(with_sizes(adapter, kind, sizes), model, ((kind,),) * len(sizes)), 0)
    except _REFUSED:
        return False
    return True


def tokens_of_size(adapter: Any, model: Any, kind: str, size: Sequence[int]) -> int:
    """Vision tokens of one medium of a shape; 0 where none can be made of it."""
    try:
        inputs = batch(with_sizes(adapter, kind, [size]), model, ((kind,),))
    except _REFUSED:
        return 0
    return len(vision_positions(model, inputs["input_ids"], 0))
