"""What a call starts, counted on an imitated device: the counter is right, and no method starts more than its bound."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from benchmarks import launch_bounds, launches
from benchmarks.common import RESULTS
from benchmarks.imitated_device import CPU, FIRST, claim

import generate
import mustdrop
from mustdrop import kernels


def counted(call):
    """The tally of a call on a tensor of the imitated device and one of the host."""
    tally = launches.Tally()
    operations = launches._Operations(tally)
    here, there = claim(torch.arange(6.0).view(2, 3), FIRST), torch.ones(2, 3)
    with torch.no_grad(), operations, launches._Counted(tally, operations):
        call(here, there)
    return {name: number for name, number in tally.total.items() if number}


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x, y: x + 1, {"launches": 1}),
        (lambda x, y: x.view(3, 2).T, {}),
        (lambda x, y: y * 2, {"host": 1}),
        (lambda x, y: x.double(), {"launches": 1}),
        (lambda x, y: x.sum().item(), {"launches": 2, "waits": 1}),
        (lambda x, y: x.tolist(), {"waits": 1}),
        (lambda x, y: x[x > 2], {"launches": 2, "waits": 1}),
        (lambda x, y: x.to(CPU), {"waits": 1}),
        (lambda x, y: y.to(FIRST) + x, {"copies": 1, "launches": 1}),
        (lambda x, y: torch.tensor([1, 2], device=FIRST), {"copies": 1}),
        (lambda x, y: kernels.farthest_first(x[None], 2), {"launches": 2}),
        (lambda x, y: kernels.select(x, x > 0, (x > 0).sum(1), 2), {"launches": 4}),
    ],
)
def test_the_counter_counts(call, expected):
    got = counted(call)
    if "waits" in expected and "launches" in expected:  # reading a number is a launch too on some versions of torch
        assert got["waits"] == expected["waits"]
        assert got["launches"] in (expected["launches"], expected["launches"] - 1)
        return
    assert got == expected


def test_mixing_devices_is_an_error():
    with pytest.raises(RuntimeError, match="same device"):
        counted(lambda x, y: x + y)


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "launches.json").read_text(encoding="utf-8"))


def test_the_committed_figures_keep_their_bounds_and_cover_every_method(committed):
    assert launch_bounds.above(committed["rows"]) == []
    places = {(row["batch"], row["cache"]) for row in committed["rows"]}
    assert {(row["method"], row["batch"], row["cache"]) for row in committed["rows"]} == {
        (method, *place) for method in ("untouched", *launches.every_method()) for place in places
    }
    assert places == {(batch, cache) for batch in launches.BATCHES for cache in launches.CACHES}


def test_a_bound_above_its_aim_is_one_that_is_needed(committed):
    """What has come down to its aim does not go up again."""
    for row in committed["rows"]:
        for figure, number in {} if "refused" in row else launch_bounds.figures(row).items():
            aim = launch_bounds.aim(row["method"], figure, row["batch"])
            most = launch_bounds.bound(row["method"], figure, row["batch"], row["cache"])
            assert aim is None or most <= aim or number > aim, (row["method"], row["batch"], row["cache"], figure)


def test_the_documents_show_the_figures(committed):
    text = generate.render("<!-- begin: launches -->\n<!-- end: launches -->\n", {"launches": committed})
    assert "| `mustdrop` |" in text


def measured(methods, batch, cache):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mustdrop.errors.NothingDroppedWarning)
        return launches.measure(launches.build(), methods, (batch,), (cache,))


@pytest.mark.parametrize(
    ("methods", "cache"), [(("mustdrop", "mustdrop+", "divprune"), "growing"), (("fastv",), "static")]
)
def test_what_a_call_starts_keeps_its_bound(methods, cache):
    assert launch_bounds.above(measured(methods, 1, cache)) == []


@pytest.mark.slow
@pytest.mark.parametrize("cache", launches.CACHES)
@pytest.mark.parametrize("batch", launches.BATCHES)
def test_what_every_method_starts_keeps_its_bound(batch, cache):
    assert launch_bounds.above(measured(launches.every_method(), batch, cache)) == []


@pytest.mark.parametrize("method", ["mustdrop", "fastv", "random"])
def test_a_static_cache_waits_no_more_than_a_growing_one(method):
    model = launches.build(layers=6, blocks=4, side=8)
    rows = launches.measure(model, (method,), (1,), launches.CACHES, keep=40, side=8)
    waits = {row["cache"]: row["prefill"]["own_waits"] for row in rows if row["method"] == method}
    assert waits["static"] == waits["growing"]
    assert {row["step"]["own_waits"] for row in rows} == {0}


PER_LAYER = {"snapkv": 0, "h2o": 0, "tgvkv": 1}  # decoder layer: two or three for reading it, less two for copies
PER_BLOCK = {"tome": 4, "mustdrop": 0}  # encoder block that merges


def more(methods, **size):
    """Launches of a prompt's pass beyond those of the untouched model, and what else is counted."""
    rows = launches.measure(launches.build(side=8, **size), methods, (1,), ("growing",), keep=24, side=8)
    return {row["method"]: row["prefill"] for row in rows}


def test_what_a_layer_adds_of_its_own():
    """The rest is the same for however many layers: reading, ranking and cutting are done for all of them together."""
    few, many = (more(tuple(PER_LAYER), layers=layers, blocks=3) for layers in (4, 7))
    for method, each in PER_LAYER.items():
        assert many[method]["more_launches"] - few[method]["more_launches"] == 3 * each, method
        for what in ("own_waits", "own_copies"):
            assert many[method][what] == few[method][what], (method, what)


def test_what_an_encoder_block_that_merges_adds_of_its_own():
    few, many = (more(tuple(PER_BLOCK), layers=2, blocks=blocks) for blocks in (4, 6))
    for method, each in PER_BLOCK.items():
        assert many[method]["more_launches"] - few[method]["more_launches"] == 2 * each, method
        for what in ("own_host", "own_waits", "own_copies"):
            assert many[method][what] == few[method][what], (method, what)


def test_a_prompt_comes_to_the_host_once():
    """Ids and mask together; nothing else is asked of a prompt that loses tokens by chance."""
    model = launches.build(layers=6, blocks=4, side=8)
    inputs = launches.prompt(2, side=8)
    with mustdrop.patched(model, "random", keep=21):
        figures, tally = launches.count(model, inputs, "growing")
    looks = [site for what, site in tally.sites if what == "waits" and "runtime/session.py" in site]
    assert len(looks) == 1, looks
    assert tally.sites["waits", looks[0]] == 1
    assert figures["step"]["own_waits"] == 0
