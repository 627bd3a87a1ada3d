"""Patches that leave a packed encoder, before its layers or inside: what is left is what the encoder makes of it when
its own attention does not look at the others. Nobody edits this file to add a family.
"""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, InputPruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import find, registry
from mustdrop.errors import ConfigError, UnsupportedModelError
from mustdrop.pruners import InputRule
from support import fake_flash, families
from support.builders import answer
from support.families import assert_dropping_equals_masking, batch, clone, plain
from support.hidden_patches import HiddenPatches, alive_in, cells_of, merged_windows, merges, patches_of, rows

TOLERANCE = 1e-5


def towers():
    """(name, kind, whether patches may leave inside, whether an input stage works) of each family that has a tower."""
    for name, adapter in registry().items():
        if not adapter.available() or "vision" in adapter.lacks:
            continue
        tower = adapter.tower(plain(name))
        for kind in adapter.media:
            yield name, kind, tower.cuts, tower.cuts and adapter.cell_pixels


ALL = list(towers())
CUT = [(name, kind) for name, kind, cuts, _ in ALL if cuts]
LET_IN = [(name, kind) for name, kind, _, lets_in in ALL if lets_in]
WHOLE = sorted({name for name, _, cuts, _ in ALL if not cuts})
CLOSED = sorted({name for name, _, _, lets_in in ALL if not lets_in})
each_cut = pytest.mark.parametrize(("name", "kind"), CUT, ids=map("-".join, CUT))
each_let_in = pytest.mark.parametrize(("name", "kind"), LET_IN, ids=map("-".join, LET_IN))

MERGE = VisionStagePruner(window=2, threshold=-1.0, key_share=0.2)
SELECT = VisionStagePruner(window=None, key_share=0.2, key_layer=1, select_layer=1, keep=0.5)
BOTH = VisionStagePruner(window=2, threshold=0.0, key_share=0.2, key_layer=1, select_layer=1, keep=0.4)


class Drawn(InputRule):
    """Lets in cells at random; the same of a picture wherever it comes."""

    share: float = 0.6

    def choose(self, media):
        kept = []
        for picture in media:
            draw = torch.Generator().manual_seed(int(picture.abs().sum() * 100) % 1000)
            mine = torch.rand(picture.shape[:3], generator=draw) < self.share
            mine[0, 0, 0] = True
            kept.append(mine)
        return kept


class Everything(InputRule):
    """Lets in everything."""

    def choose(self, media):
        return [torch.ones(picture.shape[:3], dtype=torch.bool) for picture in media]


def run(model, inputs, kind):
    """((F, C) features, levels of DeepStack) of a forward of the whole model, gone rows NaN."""
    adapter = find(model)
    with families.Recorder(model) as recorder, torch.no_grad():
        model(**inputs)
    output = recorder.outputs[kind]
    levels = [rows(level) for field in adapter.added_features for level in getattr(output, field)]
    return rows(getattr(output, adapter.features)), levels


def layouts_of(model, kind, inputs):
    return find(model).layouts(model, kind, inputs)


def number_of_patches(cells):
    return int(cells.max()) + 1


def without_breaks(features, layouts):
    """Features that stand for a part of the picture: some releases add the others later."""
    total = sum(layout.size for layout in layouts)
    if len(features) < total:
        made = features.new_zeros(total, features.shape[1])
        made[~torch.cat([layout.structural for layout in layouts])] = features
        return made
    return features


def assert_equals_hiding(monkeypatch, name, kind, attention="sdpa", *, rows=None, **settings):
    """The features that are left, against the unpatched encoder under the decisions of the patched one."""
    adapter, model = registry()[name], clone(name, attention)
    mustdrop.patch(model, **settings)
    inputs = batch(adapter, model, rows or ((kind, kind), (), (kind,)), seed=5)
    with merges(monkeypatch) as owners:
        ours, levels = run(model, inputs, kind)
    trace, layouts = mustdrop.trace(model), layouts_of(model, kind, inputs)
    cells = cells_of(layouts)
    count, alive = number_of_patches(cells), alive_in(trace)
    hide, means, hidden = {}, {}, torch.zeros(count, dtype=torch.bool)
    pruner, incoming = settings.get("vision"), settings.get("input")
    if incoming is not None:
        hidden = hidden | patches_of(cells, entered(adapter, model, kind, inputs, incoming).logical_not(), count)
        hide[0] = hidden
    if pruner is not None and pruner.window is not None:
        parts, means[pruner.layer + 1] = merged_windows(owners[0], cells)
        hidden = hidden | patches_of(cells, parts, count)
        hide[pruner.layer + 1] = hidden
    if pruner is not None and pruner.select_layer is not None:
        hide[pruner.select_layer + 1] = hidden | patches_of(cells, ~alive, count)
    oracle = plain(name, "eager")
    with HiddenPatches(oracle, hide, means, kind):
        theirs, expected = run(oracle, inputs, kind)
    assert 0 < alive.sum() < len(alive)
    for own, other in [(ours, theirs), *zip(levels, expected, strict=True)]:
        own, other = without_breaks(own, layouts), without_breaks(other, layouts)
        assert (own[alive] - other[alive]).abs().max() <= TOLERANCE
    assert without_breaks(ours, layouts)[~alive & ~torch.cat([x.structural for x in layouts])].isnan().all()
    return trace, hide, count


def entered(adapter, model, kind, inputs, pruner):
    """(F,) bool, features whose cells the input stage lets in, asked for picture by picture."""
    pixels, found = adapter.pixels(model, kind, inputs), []
    for layout in layouts_of(model, kind, inputs):
        picture = pixels[layout.patches].flatten(1).view(*layout.grids[0], -1)
        found.append(pruner([picture])[0].flatten())
    return torch.cat(found)


# -- dropping equals hiding -------------------------------------------------------------------------------------------


@each_cut
def test_windows_merge_inside(name, kind, monkeypatch):
    trace, _, _ = assert_equals_hiding(monkeypatch, name, kind, vision=MERGE)
    assert trace.flops.parts["vision"].ratio < 1


@each_cut
def test_what_is_not_selected_leaves_on_the_way(name, kind, monkeypatch):
    trace, _, _ = assert_equals_hiding(monkeypatch, name, kind, vision=SELECT)
    assert trace.flops.parts["vision"].ratio < 1


@each_let_in
def test_what_is_not_let_in_is_not_seen(name, kind, monkeypatch):
    trace, _, _ = assert_equals_hiding(monkeypatch, name, kind, input=InputPruner(rule=Drawn()))
    assert trace.flops.parts["vision"].ratio < 0.9


@each_let_in
def test_all_of_it_together(name, kind, monkeypatch):
    assert_equals_hiding(monkeypatch, name, kind, input=InputPruner(rule=Drawn(share=0.9)), vision=BOTH)


@pytest.mark.parametrize("attention", ["eager", fake_flash.NAME])
@pytest.mark.parametrize(("name", "kind"), CUT[:1] + [pair for pair in CUT if "2_5" in pair[0]][:2], ids=str)
def test_other_attention_functions(name, kind, attention, flash, monkeypatch):
    trace, _, _ = assert_equals_hiding(
        monkeypatch, name, kind, attention, input=InputPruner(rule=Drawn(share=0.9)), vision=BOTH
    )
    assert attention != fake_flash.NAME or flash["varlen"] > 0
    assert trace.dropped_anything


# -- keeping everything changes nothing -------------------------------------------------------------------------------


@each_cut
def test_where_nothing_leaves_nothing_changes(name, kind):
    pruner = VisionStagePruner(window=2, threshold=1.0, key_layer=1, select_layer=1, keep=1.0)
    settings = {"input": InputPruner(rule=Everything())} if (name, kind) in LET_IN else {}
    model = mustdrop.patch(clone(name), vision=pruner, **settings)
    inputs = batch(registry()[name], model, ((kind, kind), (kind,)))
    with pytest.warns(mustdrop.errors.NothingDroppedWarning):
        ours = answer(model, inputs, 2)
    assert torch.equal(ours.logits, answer(plain(name), inputs, 2).logits)


# -- a row of a batch is what it is alone -----------------------------------------------------------------------------


@each_let_in
def test_a_padded_row_equals_the_same_row_alone(name, kind):
    adapter, model = registry()[name], clone(name)
    mustdrop.patch(model, input=InputPruner(rule=Drawn(share=0.9)), vision=BOTH)
    lines = ((kind,), (), (kind, kind))
    together, trace = answer(model, batch(adapter, model, lines), 2), mustdrop.trace(model)
    for r, line in enumerate(lines):
        alone = answer(model, batch(adapter, model, (line,), first=r), 2)
        assert torch.equal(mustdrop.trace(model).kept(0), trace.kept(0, r))
        assert (alone.logits[0] - together.logits[r]).abs().max() <= TOLERANCE


# -- the stages behind ------------------------------------------------------------------------------------------------


@each_let_in
def test_the_stages_compose(name, kind):
    stages = {"prefill": PrefillPruner(keep=0.4), "decode": DecodeCachePruner()}
    lines = ((kind,), (), (kind, kind))
    assert_dropping_equals_masking(name, lines, steps=4, input=InputPruner(rule=Drawn()), vision=MERGE, **stages)
    both = assert_dropping_equals_masking(name, lines, steps=2, input=InputPruner(rule=Drawn()))
    assert torch.all(both.trace.equal_tokens <= both.trace.total)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLOSED)
def test_an_input_stage_is_refused_by_name(name):
    model = clone(name)
    with pytest.raises(UnsupportedModelError, match=rf"(?s)input stage.*{name}.*mustdrop\.patch\(model, \"divprune\""):
        mustdrop.patch(model, input=InputPruner())
    mustdrop.patch(model, "divprune", keep=0.5)


@pytest.mark.parametrize("name", WHOLE)
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
