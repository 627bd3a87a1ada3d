"""Old pictures shrink: entries of earlier turns' pictures leave once a newer one has come. Of every family.

Nobody edits this file to add a family.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import registry
from mustdrop.compat import spans, static_cache
from mustdrop.errors import BudgetError, ConfigError, UnsupportedModelError
from mustdrop.pruners import GeneratedRows, ObservationWindow
from support import families
from support.builders import CACHE, answer
from support.chats import answered_by_the_oracle, chat
from support.families import batch, clone, fitting, plain, vision_positions

KNOWN = families.PAIRS
FAMILIES = [(name, kind) for name, kind in KNOWN if "decode" not in registry()[name].lacks]

SHRINK = {"decode": DecodeCachePruner(old_pictures=3, cascade=False)}
ALL = {
    "vision": VisionStagePruner(window=None, keep=0.8),
    "prefill": PrefillPruner(keep=0.6),
    "decode": DecodeCachePruner(old_pictures=0.25),
}
EVICT = {"decode": DecodeCachePruner(keep=0.6, interval=2, old_pictures=4)}
ONCE = {"decode": DecodeCachePruner(keep=0.6, score=ObservationWindow(), after_prefill=True, old_pictures=4)}
SETUPS = {"shrink": SHRINK, "all": ALL, "evict": EVICT, "once": ONCE}


def turns_of(name, kind, rows):
    """One turn per entry of ``rows``; each is a batch, whose rows are padded on the left in the middle of the chat."""
    model = plain(name)
    return [batch(registry()[name], model, row, seed=3 + i) for i, row in enumerate(rows)]


@functools.lru_cache(maxsize=4)
def plainly(name, kind, rows):
    """What the unpatched model says. In some families transformers cannot go on with a new picture."""
    try:
        return chat(plain(name), turns_of(name, kind, rows)).logits
    except (ValueError, RuntimeError, IndexError, StopIteration, TypeError) as error:
        pytest.skip(f"the unpatched model cannot go on with a new picture: {type(error).__name__}: {error}"[:150])


def pytest_generate_tests(metafunc):
    """Every family with all its kinds of media meets the batch; the other tests take turns: see ``--breadth``."""
    own = metafunc.function.__name__
    if own not in TURNS:
        return
    every = metafunc.config.getoption("--breadth") != "turns"
    chosen = [pair for i, pair in enumerate(FAMILIES) if every or TURNS[i % len(TURNS)] == own]
    metafunc.parametrize(("name", "kind"), chosen, ids=map("-".join, chosen))


TURNS = ("test_three_turns", "test_keeping_everything_changes_no_bit", "test_a_padded_row_is_the_row_alone")


def check(name, kind, rows, setup, attention="sdpa"):
    turns = turns_of(name, kind, rows)
    plainly(name, kind, rows)
    model = mustdrop.patch(clone(name, attention), **fitting(name, setup))
    said = chat(model, turns)
    theirs = answered_by_the_oracle(plain(name, attention), model, turns, said)
    assert (said.logits - theirs).abs().max() <= 1e-5
    return said


def test_three_turns(name, kind):
    """Three turns of one chat; in the last one nothing new comes."""
    said = check(name, kind, (((kind,),), ((kind, kind),), ((),)), SHRINK)
    first, second = said.traces[0].kv_pictures[0], said.traces[1].kv_pictures[0]
    assert first.shape[1] == 1
    assert second.shape[1] == 1 + len(said.traces[1].media[0])  # in some families a prompt's pictures are one medium
    assert (first[:, 0] > 3).any()
    assert (second[:, 0] <= 3).all()  # the old one
    assert torch.equal(second[:, 1:], said.traces[2].kv_pictures[0][:, 1:])  # those of one turn are of one age
    assert second[:, 1:].sum() > first[:, 0].sum()


@pytest.mark.parametrize(
    ("name", "kind", "setup", "attention"),
    [
        (*pair, list(SETUPS)[i % len(SETUPS)], ("sdpa", "eager")[i // len(SETUPS) % 2])
        for i, pair in enumerate(FAMILIES)
    ],
    ids=lambda value: str(value),
)
def test_rows_whose_newest_pictures_differ(name, kind, setup, attention):
    """One row gets its pictures in other turns than the other, and rows are padded inside of the chat."""
    rows = (((kind,), (kind, kind)), ((kind, kind), ()), ((), (kind,)))
    said = check(name, kind, rows, SETUPS[setup], attention)
    if setup != "shrink":
        return
    first, second = [[trace.kv_pictures[row] for trace in said.traces] for row in (0, 1)]
    assert (first[1][:, 0] <= 3).all()
    assert (first[1][:, 1:3].sum(1) > first[1][:, 0]).all()
    n = len(said.traces[0].media[1])  # in some families the pictures of a prompt are one medium
    model = plain(name)
    whole = [i for i, span in enumerate(spans(registry()[name].text(model).config, len(second[0]))) if span is None]
    assert torch.equal(second[0][whole, :n], second[1][whole, :n])  # its newest ones, as before
    assert (second[2][:, :n] <= 3).all()


@pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")
def test_keeping_everything_changes_no_bit(name, kind):
    rows = (((kind,), (kind,)), ((kind,), ()))
    expected = plainly(name, kind, rows)
    model = mustdrop.patch(clone(name), decode=DecodeCachePruner(old_pictures=1.0, cascade=False))
    assert torch.equal(chat(model, turns_of(name, kind, rows)).logits, expected)


def test_a_padded_row_is_the_row_alone(name, kind):
    rows = (((kind,), (kind, kind)), ((kind, kind), (kind,)))
    model = mustdrop.patch(clone(name), **SHRINK)
    whole, together = plainly(name, kind, rows), chat(model, turns_of(name, kind, rows))
    for row in (0, 1):
        alone = [batch(registry()[name], model, (own[row],), seed=3 + i, first=row) for i, own in enumerate(rows)]
        if (chat(plain(name), alone).logits - whole[row : row + 1]).abs().max() > 1e-4:
            pytest.skip("padding inside of a chat counts for the unpatched model")
        own = chat(model, alone)
        assert (own.logits - together.logits[row : row + 1]).abs().max() <= 1e-5
        assert torch.equal(own.traces[1].kv_pictures[0], together.traces[1].kv_pictures[row])


@pytest.mark.parametrize(("name", "kind"), [("llava", "image"), ("llava_onevision", "video"), ("qwen2_5_vl", "image")])
@pytest.mark.parametrize("setup", ["shrink", "all", "once"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_static_cache_gives_what_a_growing_one_gives(name, kind, setup, rows):
    turns = turns_of(name, kind, (((kind,), (kind, kind))[:rows], ((kind, kind), ())[:rows], ((), (kind,))[:rows]))
    model = mustdrop.patch(clone(name), **SETUPS[setup])
    growing = chat(model, turns)
    config = registry()[name].text(model).config
    length = sum(turn["input_ids"].shape[1] for turn in turns) + 2 * len(turns)
    fixed = chat(model, turns, cache=static_cache(config, length + 3))
    assert (growing.logits - fixed.logits).abs().max() <= 1e-5
    for a, b in zip(growing.traces, fixed.traces, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.kv_pictures, b.kv_pictures, strict=True))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_best_by_the_newest_question_stay(n):
    """What an eager unpatched model's attention maps of the newest question rank highest stays, in every layer."""
    name, kind = "llava", "image"
    turns = turns_of(name, kind, (((kind,),), ((kind,),)))
    model = mustdrop.patch(clone(name), decode=DecodeCachePruner(old_pictures=n, cascade=False))
    said = chat(model, turns, steps=0)
    ids = torch.cat([turn["input_ids"] for turn in turns], 1)
    oracle = clone(name, "eager")
    with torch.no_grad():
        maps = oracle(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.cat([turn["pixel_values"] for turn in turns]),
            output_attentions=True,
        ).attentions
    where = vision_positions(oracle, ids, 0)
    old = where[where < turns[0]["input_ids"].shape[1]]
    for layer, stored in enumerate(said.stored[-1]):
        given = maps[layer][0].float().mean(0)[int(where[-1]) + 1 :].sum(0)[old]
        best = old[given.topk(n).indices].sort().values
        kept = stored[0][torch.isin(stored[0], old)]
        assert kept.tolist() == best.tolist()


def test_beams_and_a_cropped_cache_know_their_pictures():
    name, kind = "llava", "image"
    first, second = turns_of(name, kind, (((kind,),), ((kind,),)))
    model = mustdrop.patch(clone(name), **SHRINK)
    one = answer(model, first, 3, num_beams=2)
    one.cache.batch_select_indices(torch.tensor([0]))
    surplus = one.cache.get_seq_length() - first["input_ids"].shape[1]
    one.cache.crop(-surplus)
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    given = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    again = answer(model, given, 2, past_key_values=one.cache)
    trace = mustdrop.trace(model)
    assert (trace.kv_pictures[0][:, 0] == 3).all()
    fresh = answer(model, first, 0)
    assert torch.equal(again.sequences, answer(model, given, 2, past_key_values=fresh.cache).sequences)


def test_a_cache_that_was_cropped_to_nothing_has_no_old_pictures():
    first, second = turns_of("llava", "image", ((("image",),), (("image",),)))
    model = mustdrop.patch(clone("llava"), decode=DecodeCachePruner(old_pictures=1.0, cascade=False))
    with torch.no_grad():
        cache = getattr(model(**first, use_cache=True), CACHE)
    cache.crop(-cache.get_seq_length())
    expected = answer(model, second, 2)
    assert torch.equal(answer(model, second, 2, past_key_values=cache).logits, expected.logits)
    assert mustdrop.trace(model).kv_pictures[0].shape[1] == 1


def test_a_picture_that_the_mask_hides_is_no_newer_picture():
    first, second = turns_of("llava", "image", ((("image",),), (("image",),)))
    hidden = vision_positions(plain("llava"), second["input_ids"], 0)
    second["attention_mask"][0, hidden] = 0
    model = mustdrop.patch(clone("llava"), **SHRINK)
    said = chat(model, [first, second])
    assert torch.equal(said.traces[0].kv_pictures[0], said.traces[1].kv_pictures[0])
    only = mustdrop.patch(clone("llava"), **SHRINK)
    chat(only, [second])
    assert mustdrop.trace(only).kv_pictures[0].shape[1] == 0


def test_the_trace_tells_and_nothing_warns(recwarn):
    turns = turns_of("llava", "image", ((("image",),), (("image",),)))
    model = mustdrop.patch(clone("llava"), **SHRINK)
    chat(model, turns[:1])
    assert not [warning for warning in recwarn if issubclass(warning.category, mustdrop.errors.MustDropWarning)]
    said = chat(model, turns)
    shown, told = str(said.traces[1]), said.traces[1].to_dict()
    assert "of each picture" in shown
    assert [pictures[0] for pictures in told["kv_pictures"][0]] == [3] * len(said.traces[1].tokens)
    assert said.traces[1].dropped_anything
    assert not said.traces[0].dropped_anything


@pytest.mark.parametrize("bad", [0, -1, 0.0, 1.5, "all"])
def test_a_budget_out_of_range_is_named(bad):
    with pytest.raises((BudgetError, ConfigError), match="old_pictures"):
        DecodeCachePruner(old_pictures=bad)


def test_a_score_that_reads_no_prompt_is_refused():
    with pytest.raises(ConfigError, match="GeneratedRows ranks by the generated tokens"):
        DecodeCachePruner(old_pictures=3, score=GeneratedRows())
    DecodeCachePruner(old_pictures=3, score=ObservationWindow())


def test_the_default_method_takes_it():
    turns = turns_of("llava", "image", ((("image",),), (("image",),)))
    said = chat(mustdrop.patch(clone("llava"), keep=0.6, old_pictures=2), turns)
    assert (said.traces[1].kv_pictures[0][:, 0] <= 2).all()


@pytest.mark.parametrize("name", sorted({name for name, _ in KNOWN} - {name for name, _ in FAMILIES}))
def test_it_is_refused_where_there_is_no_decode_stage(name):
    with pytest.raises(UnsupportedModelError, match="no decode stage"):
        mustdrop.patch(clone(name), **SHRINK)


def test_what_it_costs():
    """A chat whose older pictures shrink stores less with every picture that comes."""
    name, kind, rows = "llava", "image", tuple(((kind,),) for kind in ["image"] * 4)
    turns = turns_of(name, kind, rows)
    shrunk = chat(mustdrop.patch(clone(name), **SHRINK), turns).traces
    whole = [trace.kv_bytes.unpruned for trace in shrunk]
    shares = [trace.kv_bytes.actual / n for trace, n in zip(shrunk, whole, strict=True)]
    assert all(b < a for a, b in itertools.pairwise(shares))
    assert shares[-1] < 0.5
