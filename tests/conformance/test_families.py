"""What every family must pass, on its own tiny configuration. Nobody edits this file to add a family.

The support table of docs/models.md is generated from the outcomes: one column per test here.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import registry
from mustdrop.errors import UnsupportedModelError, UnsupportedOptionError
from mustdrop.runtime.vision import window_merging
from support import attribution, conversations, eager_flex, fake_flash, families, hidden_patches
from support.builders import answer
from support.families import assert_dropping_equals_masking, batch, clone, fitting, plain

#: (family, kind of media) for all that are known.
KNOWN = families.PAIRS
FAMILIES = [(name, kind) for name, kind in KNOWN if "vision" not in registry()[name].lacks]
LACKING = [pair for pair in KNOWN if pair not in FAMILIES]
each = pytest.mark.parametrize(("name", "kind"), FAMILIES, ids=map("-".join, FAMILIES))

ALL = {
    "vision": VisionStagePruner(window=2, threshold=0.2),
    "prefill": PrefillPruner(keep=0.4),
    "decode": DecodeCachePruner(),
}
SELECT = {"vision": VisionStagePruner(window=None, keep=0.4)}
MERGE = {"vision": VisionStagePruner(window=2, threshold=0.2)}
CELLS = VisionStagePruner(window=2, threshold=-0.05)
PREFILL = {"prefill": PrefillPruner(keep=0.6)}
THRESHOLDS = {"prefill": PrefillPruner(global_threshold=0.04, individual_threshold=0.04)}
EVICTION = {
    "vision": VisionStagePruner(window=None, keep=0.7),
    "prefill": PrefillPruner(keep=0.5),
    "decode": DecodeCachePruner(keep=4, interval=3, full_layers=1),
}


def cascade_of(name):
    """The layer from which the cascade of ``ALL`` cuts the cache, None where there is none."""
    return None if "decode" in registry()[name].lacks else ALL["decode"].full_layers


def ragged(kind):
    """One medium, none, two: rows of different lengths, kept counts and kinds."""
    return ((kind,), (), (kind, kind))


def lacks(name, stage, record_property):
    """Whether the family lacks a stage; then its pruner is refused by name, with the reason and with what works."""
    if stage not in registry()[name].lacks:
        return False
    why = registry()[name].lacks[stage]
    record_property("refused", f"no {stage} stage: {why}")
    with pytest.raises(UnsupportedModelError) as raised:
        mustdrop.patch(clone(name), **{stage: EVICTION[stage]})
    assert f"{name} family has no {stage} stage" in str(raised.value)
    assert why in str(raised.value)
    suggested = str(raised.value).split("mustdrop.patch(model, '")[1].split("'")[0]
    mustdrop.patch(clone(name), suggested, keep=0.5)
    return True


# -- the three stages: dropping equals hiding, at the prefill and over 8 decode steps ---------------------------------


@each
def test_vision_stage_selects(name, kind):
    assert_dropping_equals_masking(name, ((kind,),), **SELECT)
    assert_dropping_equals_masking(name, ragged(kind), **SELECT)


@each
def test_vision_stage_merges(name, kind):
    # cells of a tiny packed encoder with random positions are hardly alike
    pruners = {"vision": CELLS} if registry()[name].tower(plain(name), kind).cuts else MERGE
    assert_dropping_equals_masking(name, ((kind,),), **pruners)
    assert_dropping_equals_masking(name, ragged(kind), **pruners)


@each
def test_prefill_stage(name, kind, record_property):
    if lacks(name, "prefill", record_property):
        return
    assert_dropping_equals_masking(name, ((kind,),), **PREFILL)
    assert_dropping_equals_masking(name, ragged(kind), **PREFILL)
    assert_dropping_equals_masking(name, ragged(kind), **THRESHOLDS)


@each
def test_decode_stage(name, kind, record_property):
    if lacks(name, "decode", record_property):
        return
    assert_dropping_equals_masking(name, ((kind,),), **EVICTION)
    assert_dropping_equals_masking(name, ragged(kind), **EVICTION)


@each
def test_all_stages(name, kind, record_property):
    if lacks(name, "prefill", record_property):
        return
    assert_dropping_equals_masking(name, ((kind,),), **fitting(name, ALL))
    both = assert_dropping_equals_masking(name, ragged(kind), **fitting(name, ALL))
    total = both.trace.total.float()
    assert torch.all(both.trace.equal_tokens <= 0.4 * total + 1e-4)
    assert torch.all(both.trace.equal_tokens > 0.4 * total - 1 - 1e-4)


@each
def test_several_kinds_in_one_prompt(name, kind):
    kinds = tuple(registry()[name].media)
    if len({field for _, _, field in registry()[name].media.values()}) < len(kinds):
        pytest.skip("kinds that share a placeholder token cannot be told apart: transformers takes one per prompt")
    both = assert_dropping_equals_masking(name, (kinds, (kind, *kinds), ()), **fitting(name, ALL))
    assert [sorted(m.kind for m in row) for row in both.trace.media[:2]] == [sorted(kinds), sorted((kind, *kinds))] or (
        "image" in kinds and len(both.trace.media[0]) == 1  # a family that takes all images of a row as one
    )


# -- attention backends -----------------------------------------------------------------------------------------------


@each
def test_eager_attention(name, kind):
    assert_dropping_equals_masking(name, ragged(kind), "eager", **fitting(name, ALL))


@each
def test_flash_attention(name, kind, flash, record_property):
    if registry()[name].refuses_flash:
        record_property("refused", f"Flash attention is refused: {registry()[name].refuses_flash}.")
        model = fake_flash.use(clone(name))
        with pytest.raises(UnsupportedOptionError, match="flash"):
            mustdrop.patch(model, **fitting(name, ALL))
        return
    assert_dropping_equals_masking(name, ragged(kind), fake_flash.NAME, **fitting(name, ALL))
    assert sum(flash.values()) > 0


@each
def test_flex_attention(name, kind, flex, record_property):
    text = registry()[name].text(plain(name))
    if not text._supports_flex_attn:
        record_property("refused", "Flex attention is refused: transformers does not support it in the text model.")
        model = eager_flex.force(clone(name))
        with pytest.raises(UnsupportedOptionError, match=f"{name}.*flex_attention.*{type(text).__name__}"):
            mustdrop.patch(model, **fitting(name, ALL))
        return
    assert_dropping_equals_masking(name, ragged(kind), eager_flex.NAME, **fitting(name, ALL))
    assert flex["masked"] > 0


# -- generation -------------------------------------------------------------------------------------------------------


@each
def test_beams(name, kind):
    options = {"num_beams": 3, "num_return_sequences": 2}
    families.skip_where_transformers_fails(name, kind, **options)
    assert_dropping_equals_masking(
        name, families.for_beams(name, kind), steps=5, generation=options, **fitting(name, ALL)
    )


@each
def test_sampling(name, kind):
    options = {"do_sample": True, "num_return_sequences": 2, "temperature": 0.8}
    families.skip_where_transformers_fails(name, kind, **options)
    assert_dropping_equals_masking(
        name, families.for_beams(name, kind), steps=5, generation=options, **fitting(name, ALL)
    )


@each
def test_without_cache(name, kind):
    assert_dropping_equals_masking(name, ragged(kind), steps=0, generation={"use_cache": False}, **fitting(name, ALL))


@each
def test_static_cache(name, kind, record_property):
    options = {"cache_implementation": "static"}
    try:
        assert_dropping_equals_masking(name, ragged(kind), generation=options, **fitting(name, ALL))
    except UnsupportedOptionError:  # a family with sliding layers
        record_property("refused", "A static cache is refused: it would hold layers with a sliding window.")


@each
def test_second_turn(name, kind):
    """The conversation goes on over the pruned cache."""
    both = conversations.compare_two_turns(name, kind, **fitting(name, ALL))
    assert both.hidden.anything
    assert (both.ours.logits - both.oracle.logits).abs().max() <= 1e-5
    assert torch.equal(both.ours.sequences, both.oracle.sequences)


@each
def test_new_picture_in_a_second_turn(name, kind):
    adapter, model, oracle_model = registry()[name], mustdrop.patch(clone(name), **fitting(name, ALL)), plain(name)
    first = batch(adapter, model, ((kind,),))
    with torch.no_grad():
        with families.Recorder(model) as seen_first:
            one = answer(model, first, 2)
        hidden = families.hidden_by(model, mustdrop.trace(model), first["input_ids"], cascade_of(name))
        again = conversations.with_a_new_picture(adapter, model, kind, one.sequences)
        conversations.skip_where_transformers_cannot_go_on(name, first, again)
        with families.Recorder(model) as seen_second:
            ours = answer(model, again, 4, past_key_values=one.cache)
        hidden = conversations.hidden_in_two_turns(
            hidden, mustdrop.trace(model), model, again["input_ids"], one.sequences.shape[1], step=3
        )
        with families.FamilyOracle(oracle_model, hidden, seen_first.outputs) as oracle:
            start = answer(oracle_model, first, 2, past_key_values=families.new_cache(oracle_model))
            oracle.outputs = seen_second.outputs
            theirs = answer(oracle_model, again, 4, past_key_values=start.cache)
    assert torch.equal(one.sequences, start.sequences)
    assert (ours.logits - theirs.logits).abs().max() <= 1e-5
    assert mustdrop.trace(model).dropped_anything


# -- identity ---------------------------------------------------------------------------------------------------------


@each
def test_keep_all_is_bit_identical(name, kind):
    everything = {
        "vision": VisionStagePruner(window=None, keep=1.0),
        "prefill": PrefillPruner(keep=1.0),
        "decode": DecodeCachePruner(),
    }
    model = mustdrop.patch(clone(name), **fitting(name, everything))
    inputs = batch(registry()[name], model, ragged(kind))
    with pytest.warns(mustdrop.errors.NothingDroppedWarning):
        ours = answer(model, inputs)
    theirs = answer(plain(name), inputs)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.sequences, theirs.sequences)


@each
def test_unpatch_restores(name, kind):
    model = clone(name)
    inputs = batch(registry()[name], model, ((kind,),))
    answer(model, inputs, 2)  # transformers itself leaves things behind at the first run
    before = families.lasting(model, lambda: answer(model, inputs, 2))
    mustdrop.patch(model, **fitting(name, EVICTION))
    answer(model, inputs, 2)
    mustdrop.unpatch(model)
    assert families.lasting(model) == before
    assert torch.equal(answer(model, inputs, 2).logits, answer(plain(name), inputs, 2).logits)


@each
def test_padded_row_equals_single_row(name, kind):
    adapter, model = registry()[name], mustdrop.patch(clone(name), **fitting(name, ALL))
    rows = ragged(kind)
    together = answer(model, batch(adapter, model, rows))
    kept = mustdrop.trace(model)
    layers = kept.tokens.shape[0]
    for r, row in enumerate(rows):
        alone = answer(model, batch(adapter, model, (row,), first=r))
        trace = mustdrop.trace(model)
        assert all(torch.equal(trace.kept(layer), kept.kept(layer, r)) for layer in range(layers + 1))
        assert (alone.logits[0] - together.logits[r]).abs().max() <= 1e-5


@each
def test_cache_really_shrinks(name, kind):
    model = mustdrop.patch(clone(name), **fitting(name, ALL))
    inputs = batch(registry()[name], model, ((kind,),))
    cache, trace = answer(model, inputs, 2).cache, mustdrop.trace(model)
    whole = answer(plain(name), inputs, 2, past_key_values=families.new_cache(model)).cache
    for layer, own, full in zip(trace.kv_lengths[:, 0].tolist(), cache.layers, whole.layers, strict=False):
        if own.keys is None:  # a recurrent layer
            assert layer == 0
            continue
        assert own.keys.shape[2] == layer
        assert own.keys.untyped_storage().nbytes() * full.keys.shape[2] == full.keys.nbytes * layer
    assert trace.kv_bytes.actual < trace.kv_bytes.unpruned


# -- where things are -------------------------------------------------------------------------------------------------


@each
def test_trace_names_the_right_patches(name, kind):
    """Paint one patch of the picture and follow it through an encoder whose tokens do not talk to each other."""
    adapter, model = registry()[name], clone(name)
    for place in (0.1, 0.55, 0.95):
        attribution.follow_a_patch(adapter, model, kind, place)


@each
def test_merged_features(name, kind, monkeypatch):
    """What a merged window brings: the mean, at the exit of the encoder or after the layer where it merged."""
    if registry()[name].tower(plain(name), kind).cuts:  # of cells, in one sequence
        trace = hidden_patches.assert_equals_hiding(monkeypatch, name, kind, vision=CELLS)
        assert trace.flops.parts["vision"].ratio < 1
        return
    runs = []
    merge = window_merging.merge
    monkeypatch.setattr(
        window_merging, "merge", lambda pruner, run, hidden: (merge(pruner, run, hidden), runs.append(run))[0]
    )
    model = mustdrop.patch(clone(name), **MERGE)
    inputs = batch(registry()[name], model, ((kind,), (kind, kind)))
    with families.Recorder(model) as recorder, torch.no_grad():
        model(**inputs)
    trace, plain_model = mustdrop.trace(model), plain(name)
    layouts = [medium.layout for row in trace.media for medium in row]
    ours = families.flat_features(recorder.outputs[kind], layouts)
    tower = registry()[name].tower(plain_model, kind)
    merged = runs[0].merged if runs else None
    with (
        families.Recorder(plain_model) as recorder,
        families.MergedTower(tower, MERGE["vision"].layer, merged),
        torch.no_grad(),
    ):
        plain_model(**inputs)
    theirs = families.flat_features(recorder.outputs[kind], layouts)
    start, some = 0, False
    for row, total in enumerate(trace.total.tolist()):
        slots, kept = trace.assignment(row), trace.kept(0, row)
        own, expected = ours[start : start + total], theirs[start : start + total]
        assert own.isnan().any(-1).logical_not().nonzero()[:, 0].tolist() == kept.tolist()
        for place in kept.tolist():
            members = (slots == slots[place]).nonzero()[:, 0]
            some |= len(members) > 1
            assert (own[place] - expected[members].mean(0)).abs().max() <= 1e-5
        start += total
    assert some, "nothing merged: this comparison proves nothing"


@each
def test_importance_is_the_encoders_attention(name, kind, monkeypatch):
    """A feature's importance is the mean over its patches of what the key layer's attention gives them."""
    model = mustdrop.patch(clone(name, "eager"), vision=VisionStagePruner(window=None, keep=0.5))
    inputs = batch(registry()[name], model, ((kind,), (kind, kind)))
    with torch.no_grad():
        model(**inputs)
    trace, plain_model = mustdrop.trace(model), clone(name, "eager")
    expected = families.encoder_attention(registry()[name], plain_model, kind, inputs)
    for media, marks in zip(trace.media, trace._marks, strict=True):
        for medium in media:
            patches = medium.layout.patches
            real = patches >= 0
            mean = (expected[patches.clamp(min=0)] * real).sum(1) / real.sum(1).clamp(min=1)
            assert (marks.importance[medium.index] - mean).abs().max() <= 1e-5
    assert expected.std() > 0


@each
def test_windows_over_frames(name, kind):
    """A window may span adjacent frames; what it becomes is one token of one frame."""
    pruner = VisionStagePruner(window=2, temporal_window=2, threshold=-1.0)
    both = assert_dropping_equals_masking(name, ((kind,),), vision=pruner)
    for medium in both.trace.media[0]:
        slots = both.trace.assignment()[medium.index]
        frames = {grid[0] for grid in medium.layout.grids}
        sizes = torch.bincount(slots[slots >= 0])
        assert int(sizes.max()) == (8 if max(frames) > 1 else 4)


@each
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_any_prompt_and_budget(name, kind, data):
    shared = len({field for _, _, field in registry()[name].media.values()}) < len(registry()[name].media)
    kinds = st.sampled_from([kind] if shared else sorted(registry()[name].media))
    rows = data.draw(st.lists(st.lists(kinds, max_size=2).map(tuple), min_size=1, max_size=3).map(tuple))
    keep = data.draw(st.floats(0.35, 0.9))
    window = data.draw(st.sampled_from([None, 2]))
    frames = data.draw(st.sampled_from([1, 2]))
    entering = keep if "prefill" in registry()[name].lacks else "auto"
    pruners = {
        "vision": VisionStagePruner(window=window, threshold=0.2, temporal_window=frames, keep=entering),
        "prefill": PrefillPruner(keep=keep),
        "decode": data.draw(st.sampled_from([None, DecodeCachePruner()])),
    }
    seed = data.draw(st.integers(0, 50))
    if not any(rows):
        rows = (*rows, (kind,))
    both = families.compare(name, rows, seed=seed, steps=2, **fitting(name, pruners))
    assert (both.ours.logits - both.oracle.logits).abs().max() <= 1e-5
    assert torch.all(both.trace.equal_tokens <= keep * both.trace.total + 1e-4)


# -- families that lack a stage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), LACKING, ids=map("-".join, LACKING))
def test_stages_that_are_left(name, kind, record_property):
    lacks = registry()[name].lacks
    record_property("refused", "; ".join(f"no {stage} stage: {why}" for stage, why in lacks.items()))
    for setup in (PREFILL, THRESHOLDS, EVICTION):
        left = {stage: pruner for stage, pruner in setup.items() if stage not in lacks}
        for attention in ("sdpa", "eager"):
            assert_dropping_equals_masking(name, ((kind,),), attention, **left)
            assert_dropping_equals_masking(name, ragged(kind), attention, **left)
