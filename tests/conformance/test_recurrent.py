"""Text models with recurrent layers, of every family that has some. Nobody edits this file to add a family.

What every family must pass they pass too (test_families.py). Here is what is theirs alone: rows of unequal length
behind a state that has begun, and what a cache without entries per token tells.
"""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop import VisionStagePruner
from mustdrop.adapters import find, registry
from mustdrop.errors import CacheStateError
from support.builders import CACHE, answer
from support.families import FamilyOracle, Recorder, assert_dropping_equals_masking, batch, clone, hidden_by, plain
from support.oracle import Hidden
from support.turns import continued

FAMILIES = [
    (name, kind)
    for name, adapter in registry().items()
    if adapter.available() and adapter.recurrent(plain(name))
    for kind in adapter.media
]
each = pytest.mark.parametrize(("name", "kind"), FAMILIES, ids=map("-".join, FAMILIES))
HALF = {"vision": VisionStagePruner(window=None, keep=0.5)}


def positions(model, mask, length):
    """(B, length), or with three axes in front of that, of the last tokens of a sequence that ``mask`` covers."""
    place = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
    several = "mrope_section" in (find(model).text(model).config.rope_parameters or {})
    return place.expand(3, -1, -1) if several else place


def chat(model, turns, steps=3):
    """Logits of the last token of each pass: every turn at once, over one cache, then ``steps`` tokens."""
    made, seen, cache, mask = [], [], None, None
    with torch.no_grad():
        for turn in turns:
            mask = turn["attention_mask"] if mask is None else torch.cat([mask, turn["attention_mask"]], 1)
            given = {
                **turn,
                "attention_mask": mask,
                "position_ids": positions(model, mask, turn["input_ids"].shape[1]),
                CACHE: cache,
            }
            with Recorder(model) as recorder:
                out = model(**given, use_cache=True)
            made.append(out.logits[:, -1])
            seen.append(recorder.outputs)
            cache = getattr(out, CACHE)
        for _ in range(steps):
            ids, mask = made[-1].argmax(-1)[:, None], torch.nn.functional.pad(mask, (0, 1), value=1)
            kinds = find(model).tiny_types(torch.zeros_like(ids))
            place = positions(model, mask, 1)
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=place, use_cache=True, **{CACHE: cache}, **kinds
            )
            made.append(out.logits[:, -1])
    return torch.stack(made, 1), seen, cache


class Followed:
    """The trace of every pass with media of a patched model."""

    def __init__(self, model):
        self.model, self.traces = model, []

    def __enter__(self):
        self.handle = self.model.register_forward_hook(self._note, prepend=False)
        return self.traces

    def _note(self, *_):
        self.traces.append(mustdrop.trace(self.model))

    def __exit__(self, *_):
        self.handle.remove()


def hidden_in(model, turns, traces, steps):
    """What each pass of a chat left out, over the whole sequence."""
    total = sum(turn["input_ids"].shape[1] for turn in turns)
    depth, rows, start, found = len(find(model).decoder_layers(model)), len(turns[0]["input_ids"]), 0, {}
    hidden = torch.zeros(depth, rows, total, dtype=torch.bool)
    for i, (turn, trace) in enumerate(zip(turns, traces, strict=False)):
        own = hidden_by(model, trace, turn["input_ids"]).prefill
        hidden = hidden.clone()
        hidden[..., start : start + own.shape[-1]] = own
        start += own.shape[-1]
        found[i] = hidden
    found |= {len(turns) + i: hidden for i in range(steps)}
    return Hidden(found.pop(0), hidden, found)


@each
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_new_pictures_for_rows_of_unequal_length(name, kind, attention):
    """In the second turn one row has one new picture and the other two: one is padded behind a state."""
    adapter, model, oracle_model = (
        registry()[name],
        mustdrop.patch(clone(name, attention), **HALF),
        plain(name, attention),
    )
    turns = [
        batch(adapter, model, ((kind, kind), (kind,)), seed=3),
        batch(adapter, model, ((kind,), (kind, kind)), seed=4),
    ]
    with Followed(model) as traces:
        ours, seen, cache = chat(model, turns)
    hidden = hidden_in(model, turns, traces, 3)
    assert all(bool(hidden.at(step, 0)[row].any()) for step in (0, 1) for row in (0, 1))
    with FamilyOracle(oracle_model, hidden, seen[0]) as oracle:
        replay = list(seen)
        handle = oracle_model.register_forward_pre_hook(
            lambda *_: oracle.outputs.update(replay.pop(0) if replay else {})
        )
        theirs, _, _ = chat(oracle_model, turns)
        handle.remove()
    assert (ours - theirs).abs().max() <= 1e-5
    assert cache.get_seq_length() == sum(turn["input_ids"].shape[1] for turn in turns) + 3


@each
def test_rows_of_unequal_length_are_those_alone(name, kind):
    """A row of a chat gives what it gives alone, where the other one's new pictures are more."""
    adapter, model = registry()[name], mustdrop.patch(clone(name), **HALF)
    firsts, seconds = ((kind, kind), (kind,)), ((kind,), (kind, kind))
    turns = [batch(adapter, model, rows, seed=seed) for seed, rows in ((3, firsts), (4, seconds))]
    together, _, _ = chat(model, turns)
    for row in (0, 1):
        alone = [batch(adapter, model, (rows[row],), seed=s, first=row) for s, rows in ((3, firsts), (4, seconds))]
        assert (chat(model, alone)[0] - together[row : row + 1]).abs().max() <= 1e-5


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


@each
def test_renumbered_positions(name, kind):
    """`compat="released"` renumbers what is left: it runs, and drops as many tokens."""
    model = mustdrop.patch(clone(name), vision=VisionStagePruner(window=2, threshold=-1.0, compat="released"))
    inputs = batch(registry()[name], model, ((kind,), (kind, kind)))
    assert answer(model, inputs, 2).logits.isfinite().all()
    assert mustdrop.trace(model).dropped_anything
