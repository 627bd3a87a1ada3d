"""Patches that leave a packed encoder, before its layers or inside: what is left is what the encoder makes of it when
its own attention does not look at the others. Nobody edits this file to add a family.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mustdrop
from mustdrop import DecodeCachePruner, InputPruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import registry
from mustdrop.errors import ConfigError, UnsupportedModelError
from support import fake_flash, families
from support.builders import answer
from support.families import assert_dropping_equals_masking, batch, clone, plain
from support.hidden_patches import TOLERANCE, Drawn, Everything, assert_equals_hiding, layouts_of


def towers():
    """(name, kind of media, its tower) of each family that has a vision stage."""
    for name, adapter in families.AVAILABLE.items():
        if "vision" not in adapter.lacks:
            for kind in adapter.media:
                yield name, kind, adapter.tower(plain(name), kind)


ALL = list(towers())
CUT = [(name, kind) for name, kind, tower in ALL if tower.cuts]
LET_IN = [(name, kind) for name, kind in CUT if registry()[name].cell_pixels]
MADE = [(name, kind) for name, kind, tower in ALL if tower.embeds is not None and registry()[name].cell_pixels]
WHOLE = sorted({name for name, _, tower in ALL if not tower.cuts})
CLOSED = sorted({name for name, kind, _ in ALL if (name, kind) not in LET_IN})


def sort_of(tower):
    """What decides how patches leave it: windows, several mergers, mergers at all, a mask instead of borders."""
    masked = "attention_mask" in inspect.signature(type(tower.blocks[0]).forward).parameters
    return bool(tower.whole), len(tower.mergers) > 1, bool(tower.mergers), masked


#: The first family with each sort of tower, per kind of media: all there is to see, unless more is asked for.
FIRST = list({(sort_of(tower), kind): (name, kind) for name, kind, tower in reversed(ALL)}.values())


def pytest_generate_tests(metafunc):
    """`cut` and `let_in` are (family, kind of media); with `--breadth more` all of them, else one of each tower."""
    for fixture, known in (("cut", CUT), ("let_in", LET_IN)):
        if fixture in metafunc.fixturenames:
            few = metafunc.config.getoption("--breadth") == "turns"
            chosen = [pair for pair in known if pair in FIRST or not few]
            metafunc.parametrize(fixture, chosen, ids=map("-".join, chosen))


MERGE = VisionStagePruner(window=2, threshold=-1.0, key_share=0.2)
SELECT = VisionStagePruner(window=None, key_share=0.2, key_layer=1, select_layer=1, keep=0.5)
BOTH = VisionStagePruner(window=2, threshold=0.0, key_share=0.2, key_layer=1, select_layer=1, keep=0.4)


# -- dropping equals hiding; that windows merge inside is in test_families.py ----------------------------------------


def test_what_is_not_selected_leaves_on_the_way(cut, monkeypatch):
    trace = assert_equals_hiding(monkeypatch, *cut, vision=SELECT)
    assert trace.flops.parts["vision"].ratio < 1


def test_a_rule_that_merges_on_the_way(cut, monkeypatch):
    pruner = mustdrop.registry.resolve("tome", keep=0.4, select_layer=1).vision
    trace = assert_equals_hiding(monkeypatch, *cut, vision=pruner)
    assert all((trace.assignment(row) >= 0).all() for row in range(3))  # nothing is gone without a trace
    assert trace.flops.parts["vision"].ratio < 1


def test_a_rule_that_compares_features_on_the_way(monkeypatch):
    rule = mustdrop.registry.resolve("divprune", keep=0.5).vision.score
    pruner = VisionStagePruner(window=None, key_share=0, keep=0.5, score=rule, select_layer=1)
    assert_equals_hiding(monkeypatch, "qwen2_5_vl", "image", vision=pruner)


def test_the_paper_s_method_selects_on_the_way():
    both = assert_dropping_equals_masking(
        "qwen2_5_vl", (("image",), ("image", "image")), steps=2, method="mustdrop", keep=0.3, window=2, select_layer=1
    )
    assert torch.all(both.trace.equal_tokens <= 0.3 * both.trace.total + 1e-4)
    behind = mustdrop.patch(clone("qwen2_5_vl"), "mustdrop", keep=0.3, window=2, inside=False)
    with torch.no_grad():
        behind(**batch(registry()["qwen2_5_vl"], behind, (("image",), ("image", "image"))))
    assert both.trace.flops.parts["vision"].ratio < mustdrop.trace(behind).flops.parts["vision"].ratio == 1


def test_what_is_not_let_in_is_not_seen(let_in, monkeypatch):
    trace = assert_equals_hiding(monkeypatch, *let_in, input=InputPruner(rule=Drawn()))
    assert trace.flops.parts["vision"].ratio < 0.9


@pytest.mark.parametrize(("name", "kind"), MADE, ids=map("-".join, MADE))
def test_what_is_not_let_in_is_no_patch_either(name, kind):
    adapter, model = registry()[name], mustdrop.patch(clone(name), input=InputPruner(rule=Drawn()))
    counts, inputs = [], batch(adapter, model, ((kind,), (kind, kind)))
    embeds = adapter.tower(model, kind).embeds
    handle = embeds.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    cells = torch.cat([medium.layout.patches for media in mustdrop.trace(model).media for medium in media])
    entered = sum(int((layout.patches >= 0).sum()) for layout in layouts_of(model, kind, inputs))
    assert len(counts) == 1
    assert counts[0] < entered == int((cells >= 0).sum())


def test_all_of_it_together(let_in, monkeypatch):
    assert_equals_hiding(monkeypatch, *let_in, input=InputPruner(rule=Drawn(share=0.9)), vision=BOTH)


@pytest.mark.parametrize("attention", ["eager", fake_flash.NAME])
@pytest.mark.parametrize("pair", [("qwen2_5_vl", "video"), ("qwen3_vl", "image")], ids="-".join)
def test_other_attention_functions(pair, attention, flash, monkeypatch):
    assert_equals_hiding(monkeypatch, *pair, attention, input=InputPruner(rule=Drawn(share=0.9)), vision=BOTH)
    assert attention != fake_flash.NAME or flash["varlen"] > 0


# -- keeping everything changes nothing -------------------------------------------------------------------------------


def test_where_nothing_leaves_nothing_changes(cut):
    name, kind = cut
    pruner = VisionStagePruner(window=2, threshold=1.0, key_layer=1, select_layer=1, keep=1.0)
    settings = {"input": InputPruner(rule=Everything())} if cut in LET_IN else {}
    model = mustdrop.patch(clone(name), vision=pruner, **settings)
    inputs = batch(registry()[name], model, ((kind, kind), (kind,)))
    with pytest.warns(mustdrop.errors.NothingDroppedWarning):
        ours = answer(model, inputs, 2)
    assert torch.equal(ours.logits, answer(plain(name), inputs, 2).logits)


# -- a row of a batch is what it is alone -----------------------------------------------------------------------------


def test_a_padded_row_equals_the_same_row_alone(let_in):
    name, kind = let_in
    adapter, model = registry()[name], clone(name)
    mustdrop.patch(model, input=InputPruner(rule=Drawn(share=0.9)), vision=BOTH)
    lines = ((kind,), (), (kind, kind))
    together, trace = answer(model, batch(adapter, model, lines), 2), mustdrop.trace(model)
    for r, line in enumerate(lines):
        alone = answer(model, batch(adapter, model, (line,), first=r), 2)
        assert torch.equal(mustdrop.trace(model).kept(0), trace.kept(0, r))
        assert (alone.logits[0] - together.logits[r]).abs().max() <= TOLERANCE


# -- the stages behind ------------------------------------------------------------------------------------------------


def test_the_stages_compose(let_in):
    name, kind = let_in
    if "prefill" in registry()[name].lacks:
        pytest.skip("this family has no stages behind the encoder")
    stages = {"prefill": PrefillPruner(keep=0.4), "decode": DecodeCachePruner()}
    lines = ((kind,), (), (kind, kind))
    both = assert_dropping_equals_masking(name, lines, steps=3, input=InputPruner(rule=Drawn()), vision=MERGE, **stages)
    assert torch.all(both.trace.equal_tokens <= 0.4 * both.trace.total + 1e-4)


VISION = [
    None,
    MERGE,
    SELECT,
    BOTH,
    VisionStagePruner(window=2, threshold=-1.0, inside=False, keep=0.6),
    VisionStagePruner(window=3, threshold=0.0, key_share=0.2),
    VisionStagePruner(window=None, key_share=0.2, keep=0.5),
    mustdrop.registry.resolve("tome", keep=0.5, select_layer=1).vision,
    mustdrop.registry.resolve("divprune", keep=0.5).vision,
]


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_any_composition(cut, data):
    name, kind = cut
    adapter, lacks = registry()[name], registry()[name].lacks
    rows = data.draw(st.lists(st.lists(st.just(kind), max_size=3).map(tuple), min_size=1, max_size=3).map(tuple))
    rows = rows if any(rows) else (*rows, (kind,))
    found = {"vision": data.draw(st.sampled_from(VISION))}
    if adapter.cell_pixels:
        rule = st.floats(0.3, 0.95).map(lambda share: InputPruner(rule=Drawn(share=share)))
        found["input"] = data.draw(st.one_of(st.none(), rule, st.just(InputPruner())))
    if "prefill" not in lacks:
        found["prefill"] = data.draw(st.sampled_from([None, PrefillPruner(keep=0.7)]))
        found["decode"] = data.draw(st.sampled_from([None, DecodeCachePruner()]))
    found = {stage: pruner for stage, pruner in found.items() if pruner is not None}
    if not found:
        return
    seed, attention = data.draw(st.integers(0, 10000)), data.draw(st.sampled_from(["sdpa", "eager"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mustdrop.errors.NothingDroppedWarning)
        both = families.compare(name, rows, attention, steps=2, seed=seed, **found)
        row = data.draw(st.sampled_from([row for row, media in enumerate(rows) if media]))
        alone = mustdrop.patch(clone(name, attention), **found)
        answer(alone, batch(adapter, alone, (rows[row],), seed, first=row), 1)
    assert (both.ours.logits - both.oracle.logits).abs().max() <= TOLERANCE
    assert torch.equal(mustdrop.trace(alone).kept(0), both.trace.kept(0, row))


@pytest.mark.parametrize("method", ["divprune", "tome", "visionzip", "dart", "snapkv"])
def test_an_input_stage_in_front_of_other_methods(method):
    built = mustdrop.registry.resolve(method, keep=0.5)
    made = replace(built, input=InputPruner(rule=Drawn()))
    both = families.compare("qwen3_vl", (("image",), (), ("image", "image")), steps=2, method=made)
    assert (both.ours.logits - both.oracle.logits).abs().max() <= TOLERANCE
    assert both.trace.flops.parts["vision"].ratio < 1


# -- cells are found in the pictures ----------------------------------------------------------------------------------


def test_a_cell_that_differs_is_the_one_that_enters(let_in):
    """In a picture of one colour but for one cell, the first cell, that cell, and what follows it enter."""
    name, kind = let_in
    adapter, model = registry()[name], mustdrop.patch(clone(name), input=InputPruner())
    spot = (9, 13)  # row and column of a pixel that no frame lacks

    def paint(_, picture):
        flat = torch.zeros_like(picture)
        flat[..., spot[0], spot[1]] = 1.0
        return flat

    inputs = batch(adapter, model, ((kind,),), paint=paint)
    with torch.no_grad():
        model(**inputs)
    trace = mustdrop.trace(model)
    (medium,) = trace.media[0]
    (_, rows, columns), kept = medium.layout.grids[0], set(trace.kept(0).tolist())
    side = 4 * round(medium.layout.patches.shape[1] ** 0.5) if medium.layout.patches.shape[1] != 8 else 8
    row, column = spot[0] // side, spot[1] // side
    expected = {(0, 0), (row, column)} | {(row, column + 1)} | {(row + 1, column)}
    cells = {r * columns + c for r, c in expected if r < rows and c < columns}
    found = {int(medium.layout.cells[i]) for i in kept}
    assert {0, row * columns + column} <= found <= cells


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLOSED)
def test_an_input_stage_is_refused_by_name(name):
    model = clone(name)
    with pytest.raises(UnsupportedModelError, match=rf"(?s)input stage.*{name}.*mustdrop\.patch\(model, \"divprune\""):
        mustdrop.patch(model, input=InputPruner())


@pytest.mark.parametrize("name", sorted(name for name, adapter in registry().items() if "vision" in adapter.lacks))
def test_an_input_stage_is_refused_where_the_encoder_cannot_be_looked_into(name):
    with pytest.raises(UnsupportedModelError, match=rf"(?s)input stage.*{name}.*\"fastv\""):
        mustdrop.patch(clone(name), "pixelprune")


def test_what_the_refusal_names_works():
    mustdrop.patch(clone(CLOSED[0]), "divprune", keep=0.5)


@pytest.mark.parametrize("name", WHOLE[:3])
def test_selecting_on_the_way_is_refused_by_name(name):
    with pytest.raises(UnsupportedModelError, match="select_layer"):
        mustdrop.patch(clone(name), vision=SELECT)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"select_layer": 9}, "layers 0 to 3"),
        ({"select_layer": 1, "key_layer": 2}, "layer 2 is read"),
        ({"select_layer": 0, "key_layer": 0, "window": 2}, "must come after the merging layer|key_layer"),
    ],
)
def test_layers_that_do_not_fit(knobs, message):
    with pytest.raises(ConfigError, match=message):
        mustdrop.patch(clone("qwen2_5_vl"), vision=VisionStagePruner(**{"window": None, "keep": 0.5, **knobs}))
