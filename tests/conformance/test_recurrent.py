"""Text models with recurrent layers, of every family that has some. Nobody edits this file to add a family.

What every family must pass they pass too (test_families.py). Here is what is theirs alone: rows of unequal length
behind a state that has begun, and what a cache without entries per token tells.
"""

from __future__ import annotations

import pytest

import mustdrop
from mustdrop import VisionStagePruner
from mustdrop.adapters import registry
from mustdrop.errors import CacheStateError
from support import families
from support.builders import answer
from support.chats import answered_by_the_oracle, chat
from support.conversations import continued
from support.families import assert_dropping_equals_masking, batch, clone, plain

FAMILIES = [
    (name, kind)
    for name, adapter in families.AVAILABLE.items()
    if adapter.recurrent(plain(name))
    for kind in adapter.media
]
each = pytest.mark.parametrize(("name", "kind"), FAMILIES, ids=map("-".join, FAMILIES))
HALF = {"vision": VisionStagePruner(window=None, keep=0.5)}


def turns_of(name, kind, rows=(0, 1)):
    """Two turns of two rows: two pictures and one, then one and two, so that a row is padded behind a state."""
    counts = ((2, 1), (1, 2))
    return [
        batch(registry()[name], plain(name), [(kind,) * own[row] for row in rows], seed=3 + i, first=rows[0])
        for i, own in enumerate(counts)
    ]


@each
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_new_pictures_for_rows_of_unequal_length(name, kind, attention):
    """The same text model on the shorter sequence, row by row, over the chat."""
    model, turns = mustdrop.patch(clone(name, attention), **HALF), turns_of(name, kind)
    said = chat(model, turns)
    assert all(trace.dropped_anything for trace in said.traces)
    theirs = answered_by_the_oracle(plain(name, attention), model, turns, said)
    assert (said.logits - theirs).abs().max() <= 1e-5
    assert said.cache.get_seq_length() == sum(turn["input_ids"].shape[1] for turn in turns) + 4


@each
def test_rows_of_unequal_length_are_those_alone(name, kind):
    """A row of a chat gives what it gives alone, where the other one's new pictures are more."""
    model = mustdrop.patch(clone(name), **HALF)
    together = chat(model, turns_of(name, kind)).logits
    for row in (0, 1):
        alone = chat(model, turns_of(name, kind, (row,))).logits
        assert (alone - together[row : row + 1]).abs().max() <= 1e-5


@each
def test_what_a_cache_without_entries_tells(name, kind):
    """No entries of recurrent layers, as many bytes as before; the others lose what was dropped."""
    adapter, model = registry()[name], mustdrop.patch(clone(name), **HALF)
    inputs = batch(adapter, model, ((kind,), (kind, kind)))
    ours = answer(model, inputs, 2)
    trace, recurrent = mustdrop.trace(model), set(adapter.recurrent(model))
    whole = answer(plain(name), inputs, 2)
    for i, (layer, full) in enumerate(zip(ours.cache.layers, whole.cache.layers, strict=True)):
        if i in recurrent:
            assert trace.kv_lengths[i].tolist() == trace.kv_vision[i].tolist() == [0, 0]
            held, unpruned = layer.bytes_held()
            assert held == unpruned > 0
        else:
            assert layer.keys.shape[2] == int(trace.kv_lengths[i].max()) < full.keys.shape[2]
            assert trace.kv_vision[i].tolist() == trace.tokens[0].tolist()
    assert trace.equal_entries.tolist() == trace.equal_tokens.tolist() == trace.tokens[0].tolist()
    assert ours.cache.get_seq_length() == whole.cache.get_seq_length()
    assert 0 < trace.kv_bytes.actual < trace.kv_bytes.unpruned
    assert trace.flops.parts["decode_step"].actual < trace.flops.parts["decode_step"].unpruned
    mustdrop.unpatch(model)
    again = continued(adapter, model, ours.sequences)
    with pytest.raises(CacheStateError, match="not patched"):
        answer(model, again, 1, past_key_values=ours.cache)


@each
def test_drafts(name, kind):
    """Where the unpatched model takes drafts back, the patched one does."""
    options = {"prompt_lookup_num_tokens": 2}
    try:
        answer(plain(name), batch(registry()[name], plain(name), ((kind,),)), 3, **options)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"the unpatched model raises: {str(error)[:100]}")
    assert_dropping_equals_masking(name, ((kind,),), steps=3, generation=options, **HALF)
