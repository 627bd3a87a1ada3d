"""`keep` is the equal-token budget: the mean over the decoder layers of the vision tokens that a layer processes."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.budget import check_keep, schedule, share_out, spans, spread, tokens_of
from mustdrop.errors import BudgetError, ConfigError, MustDropError
from mustdrop.method import find

PAPER_LAYERS = (2, 6, 10, 14)


def equal_tokens(total, n_layers, layers, survivors):
    """Written from the definition: walk the layers; a filter layer still processes what came in."""
    alive, processed = total, 0
    leaves_after = dict(zip(layers, survivors, strict=True))
    for layer in range(n_layers):
        processed += alive
        alive = leaves_after.get(layer, alive)
    return processed / n_layers


def named_smallest(error):
    """The smallest possible budget that the message of a BudgetError names."""
    return int(re.search(r"smallest possible \w+ is (\d+)", str(error.value)).group(1))


@st.composite
def models(draw):
    """(vision tokens, decoder layers, filter layers)"""
    n_layers = draw(st.integers(2, 48))
    layers = draw(st.sets(st.integers(0, n_layers - 2), min_size=1, max_size=5))
    return draw(st.integers(1, 3000)), n_layers, tuple(sorted(layers))


@pytest.mark.parametrize("keep", [192, 128, 64])
def test_the_papers_operating_points_on_llava_1_5(keep):
    survivors = schedule(576, 32, PAPER_LAYERS, keep)
    assert len(survivors) == 4
    assert keep - 1 < equal_tokens(576, 32, PAPER_LAYERS, survivors) <= keep


@pytest.mark.parametrize(("keep", "tokens"), [(1 / 3, 192), (2 / 9, 128), (1 / 9, 64)])
def test_a_share_is_a_share_of_the_prompts_vision_tokens(keep, tokens):
    assert schedule(576, 32, PAPER_LAYERS, keep) == schedule(576, 32, PAPER_LAYERS, tokens)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(models(), st.floats(0.001, 1.0))
def test_never_exceeded_and_missed_by_less_than_one_token(model, share):
    total, n_layers, layers = model
    keep = max(1, round(share * total))
    try:
        survivors = schedule(total, n_layers, layers, keep)
    except BudgetError:
        assume(False)
    reached = equal_tokens(total, n_layers, layers, survivors)
    assert reached <= keep + 1e-9
    assert keep - reached < 1
    assert all(1 <= b <= a for a, b in zip((total, *survivors), survivors, strict=False))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(models(), st.floats(0.001, 1.0))
def test_shares_are_never_exceeded_and_missed_by_less_than_one_token(model, share):
    total, n_layers, layers = model
    try:
        survivors = schedule(total, n_layers, layers, share)
    except BudgetError:
        assume(False)
    reached = equal_tokens(total, n_layers, layers, survivors)
    assert share * total - 1 < reached + 1e-6
    assert reached <= share * total + 1e-6


@settings(max_examples=200, deadline=None, derandomize=True)
@given(models())
def test_an_impossible_budget_names_the_smallest_possible_one(model):
    total, n_layers, layers = model
    assume(total > 1)
    try:
        schedule(total, n_layers, layers, 1)
    except BudgetError as error:
        least = int(re.search(r"smallest possible \w+ is (\d+)", str(error)).group(1))
        assert 1 < least <= total
        schedule(total, n_layers, layers, least)
        with pytest.raises(BudgetError):
            schedule(total, n_layers, layers, least - 1)
    else:
        assert math.isclose(equal_tokens(total, n_layers, layers, schedule(total, n_layers, layers, 1)), 1, abs_tol=1)


def test_the_smallest_possible_budget_is_what_the_layers_before_the_first_filter_cost():
    with pytest.raises(BudgetError) as error:
        schedule(576, 32, PAPER_LAYERS, 10)
    least = named_smallest(error)  # layers 0, 1, 2 process all 576, the other 29 at least one token
    assert least == math.ceil((3 * 576 + 29) / 32) == 55
    assert schedule(576, 32, PAPER_LAYERS, least)[-1] >= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(models())
def test_keeping_everything_drops_nothing(model):
    total, n_layers, layers = model
    assert schedule(total, n_layers, layers, total) == schedule(total, n_layers, layers, 1.0) == (total,) * len(layers)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(models(), st.integers(1, 3000), st.integers(0, 100))
def test_a_larger_budget_never_processes_less(model, keep, more):
    total, n_layers, layers = model
    assume(keep + more <= total)
    try:
        small = schedule(total, n_layers, layers, keep)
    except BudgetError:
        assume(False)
    large = schedule(total, n_layers, layers, keep + more)
    assert equal_tokens(total, n_layers, layers, small) <= equal_tokens(total, n_layers, layers, large) + 1e-9


@pytest.mark.parametrize("keep", [0, -1, -0.5, 0.0, 1.5, 577, float("nan"), True, "64", None])
def test_a_budget_that_can_never_be_right_is_refused(keep):
    with pytest.raises(BudgetError) as error:
        schedule(576, 32, PAPER_LAYERS, keep)
    assert isinstance(error.value, MustDropError)
    assert isinstance(error.value, ValueError)
    assert "keep" in str(error.value)


def test_a_budget_above_the_image_says_how_many_tokens_there_are():
    with pytest.raises(BudgetError, match="576"):
        schedule(576, 32, PAPER_LAYERS, 577)


@pytest.mark.parametrize("layers", [(31,), (32,), (-1,), (2, 40), (6, 2), (2, 2)])
def test_layers_outside_the_model_or_out_of_order_are_refused(layers):
    with pytest.raises(ConfigError):
        schedule(576, 32, layers, 192)


@pytest.mark.parametrize(
    ("keep", "tokens"),
    [
        (np.int64(64), 64),
        (np.int32(64), 64),
        (torch.tensor(64), 64),
        (np.array(64), 64),
        (np.float32(0.25), 144),
        (np.float64(0.25), 144),
        (torch.tensor(0.25), 144),
    ],
)
def test_scalars_of_numpy_and_torch_are_numbers(keep, tokens):
    assert schedule(576, 32, PAPER_LAYERS, keep) == schedule(576, 32, PAPER_LAYERS, tokens)
    assert type(check_keep(keep)) in (int, float)
    for pruner in (VisionStagePruner(keep=keep), PrefillPruner(keep=keep), DecodeCachePruner(keep=keep)):
        assert type(pruner.keep) in (int, float)
    made = find("mustdrop", keep=keep, window=np.int64(2), threshold=np.float32(0.5), layers=(np.int64(1), 2))
    assert made.vision.window == 2
    assert made.prefill.layers == (1, 2)


@pytest.mark.parametrize("keep", [np.bool_(True), torch.tensor([64]), np.array([3, 4]), np.int64(0), np.float32(1.5)])
def test_what_is_no_number_is_refused(keep):
    with pytest.raises(BudgetError):
        check_keep(keep)
    with pytest.raises(BudgetError):
        PrefillPruner(keep=keep)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 40), st.lists(st.integers(0, 30), min_size=1, max_size=4), st.data())
def test_shares_add_up_and_whoever_needs_a_token_has_one(amount, sizes, data):
    assume(any(sizes))
    needs = data.draw(st.sampled_from([None, *(i for i, size in enumerate(sizes) if size)]))
    parts = share_out(amount, sizes, needs)
    assert sum(parts) == amount
    assert min(parts) >= 0
    if needs is None:
        assert all(abs(part - amount * size / sum(sizes)) < 1 for part, size in zip(parts, sizes, strict=True))
    elif amount:
        assert parts[needs] >= 1
    shared = share_out(amount, sizes, needs, each=True)
    assert sum(shared) == amount
    assert needs is None or not amount or shared[needs] >= 1
    some = [part for part, size in zip(shared, sizes, strict=True) if size]
    assert min(some) >= (amount >= len(some))  # one for each where they go round
    assert max(shared) <= max(parts)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(models(), st.floats(0.001, 1.0))
def test_a_budget_that_only_a_divided_token_could_meet_leaves_one(model, share):
    total, n_layers, layers = model
    tokens = tokens_of(share, total, strict=False)
    assert 1 <= tokens <= total
    try:
        survivors = spread(total, n_layers, layers, tokens, strict=False)
    except BudgetError:
        assert n_layers * tokens <= spans(n_layers, layers)[0] * total + 1e-6
        return
    assert equal_tokens(total, n_layers, layers, survivors) < tokens + 1
