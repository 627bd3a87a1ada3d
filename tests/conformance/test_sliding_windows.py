"""Decoder layers that see a window or a chunk: drafts, crops, caches that are handed over, and cache policies.

Every family with such layers runs every test: whatever holds its cache otherwise must give the same numbers. The other
axes (setups, windows, kinds of drafts, policies) take turns over the families; ``--breadth more`` runs their product.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.adapters import find, registry
from mustdrop.adapters.base import Adapter
from mustdrop.compat import spans
from mustdrop.errors import CacheStateError, ConfigError, UnsupportedOptionError
from support import fake_flash
from support.builders import answer
from support.conversations import continued, skip_where_transformers_cannot_go_on, with_a_new_picture
from support.families import batch, clone, plain
from support.passes import differences, left
from support.versions import CACHE, RECORDS_PAST, TRANSFORMERS
from tests.families import fixture_of


def has_windows(adapter: Adapter) -> bool:
    """Whether any decoder layer of a family's tiny model sees a window or a chunk."""
    if not adapter.available() or adapter.lacks:
        return False
    kinds = fixture_of(adapter).config().get("text_config", {})
    return any(kinds.get(name) for name in ("sliding_window", "attention_chunk_size"))


FAMILIES = [name for name, adapter in registry().items() if has_windows(adapter)]
records = pytest.mark.skipif(not RECORDS_PAST, reason="caches of this version do not record their past")

SETUPS: dict[str, dict[str, Any]] = {
    "none": {"method": "none"},
    "everything kept": {"method": "mustdrop", "keep": 1.0},
    "all stages": {
        "vision": VisionStagePruner(window=2, threshold=0.2),
        "prefill": PrefillPruner(keep=0.4),
        "decode": DecodeCachePruner(),
    },
    "snapkv": {"method": "snapkv", "keep": 5},
    "tgvkv": {"method": "tgvkv", "keep": 5},
}
WHOLE = ("none", "everything kept")
DROPPING = [name for name in SETUPS if name not in WHOLE]
#: Before 5.19 an assistant with windows raises by itself, and gets the pixels again with every draft.
LOOKUPS = ("lookup", "long lookup")
DRAFTS = LOOKUPS if TRANSFORMERS.release < (5, 19) else ("lookup", "assistant", "long lookup", "patched assistant")
POLICIES: dict[str, dict[str, Any]] = {
    "snapkv": {"method": "snapkv", "keep": 4},
    "h2o": {"method": "h2o", "keep": 4},
    "tgvkv": {"method": "tgvkv", "keep": 4},
}
EVICTING: dict[str, dict[str, Any]] = {
    "h2o waits": {"method": "h2o", "keep": 3, "interval": 2},
    "generated rows": {"decode": DecodeCachePruner(keep=3, interval=3)},
}
WINDOWS = (None, 3, 6)  # as the tiny model has it; smaller than drafts are long; smaller than a picture
AXES = {"setup": SETUPS, "window": WINDOWS, "drafts": DRAFTS, "policy": POLICIES, "evicting": EVICTING}
TOLERANCE = 1e-5


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every family, with the next value of each axis, or with all of their product."""
    if "name" not in metafunc.fixturenames:
        return
    axes = {axis: list(values) for axis, values in AXES.items() if axis in metafunc.fixturenames}
    if "dropping" in metafunc.fixturenames:
        axes["dropping"] = DROPPING
    cases = [
        (name, *values)
        for turn, name in enumerate(FAMILIES)
        for values in (
            [tuple(options[turn % len(options)] for options in axes.values())]
            if metafunc.config.getoption("--breadth") == "turns"
            else itertools.product(*axes.values())
        )
    ]
    metafunc.parametrize(("name", *axes), cases, ids=["-".join(map(str, case)) for case in cases])


pytestmark = pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")


def patched(name: str, setup: str, window: int | None = None) -> Any:
    return mustdrop.patch(seeing(clone(name), window), **SETUPS[setup])


def seeing(model: Any, window: int | None) -> Any:
    """A model whose windows or chunks have another size."""
    config = find(model).text(model).config
    if window is not None:
        field = "attention_chunk_size" if getattr(config, "attention_chunk_size", None) else "sliding_window"
        setattr(config, field, window)
    return model


def prompt(name: str, model: Any, words: tuple[int, ...] = (), rows: int = 1) -> dict[str, Tensor]:
    """One picture per row, and words after it."""
    inputs = batch(registry()[name], model, [("image",)] * rows, seed=4)
    if words:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([words] * rows)], 1)
        for field in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            if field in inputs:
                more = torch.full((rows, len(words)), int(field == "attention_mask"))
                inputs[field] = torch.cat([inputs[field], more], 1)
    return inputs


def new_cache(model: Any) -> Any:
    return DynamicCache(config=model.config.get_text_config())


def feed(model: Any, cache: Any, *tokens: int) -> Tensor:
    """(B, n, V) logits of tokens that follow one another, in one pass."""
    rows = cache.layers[0].keys.shape[0]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([tokens] * rows),
            attention_mask=torch.ones(rows, int(cache.get_seq_length()) + len(tokens), dtype=torch.long),
            **{CACHE: cache},
        ).logits[:, -len(tokens) :]


def prefilled(model: Any, inputs: dict[str, Tensor], cache: Any) -> Any:
    with torch.no_grad():
        model(**inputs, use_cache=True, **{CACHE: cache})
    return cache


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# -- drafts -----------------------------------------------------------------------------------------------------------

REPEATED = (40, 41, 42, 43, 44, 45, 40, 41, 42)


def drafting(model: Any, kind: str) -> dict[str, Any]:
    if kind == "lookup":
        return {"prompt_lookup_num_tokens": 4}
    if kind == "long lookup":  # drafts reach further back than a window of 3
        return {"prompt_lookup_num_tokens": 12, "max_matching_ngram_size": 1}
    assistant = copy.deepcopy(mustdrop.unpatch(copy.deepcopy(model)) if kind == "assistant" else model)
    with torch.no_grad():  # right at times
        for parameter in assistant.get_output_embeddings().parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return {"assistant_model": assistant}


def test_drafts_change_no_answer(name, setup, window, drafts):
    model = patched(name, setup, window)
    inputs = prompt(name, model, REPEATED)
    end = {"eos_token_id": 511}
    expected = answer(model, inputs, 11, **end)
    drafted = answer(model, inputs, 11, **end, **drafting(model, drafts))
    if setup in WHOLE:
        assert torch.equal(expected.sequences, answer(seeing(clone(name), window), inputs, 11, **end).sequences)
    length, steps = expected.sequences.shape[1], expected.logits.shape[1]
    assert torch.equal(drafted.sequences[:, :length], expected.sequences)
    assert apart(drafted.logits[:, :steps], expected.logits) <= TOLERANCE
    if drafted.sequences.shape[1] > length:  # older versions take a whole draft at the end
        return
    again = continued(registry()[name], model, torch.cat([expected.sequences, torch.tensor([REPEATED])], 1))
    after = [answer(model, again, 3, past_key_values=one.cache).logits for one in (expected, drafted)]
    assert apart(*after) <= TOLERANCE


# -- crops ------------------------------------------------------------------------------------------------------------


@records
def test_what_was_fed_and_cropped_leaves_no_trace(name, setup, window):
    model = patched(name, setup, window)
    inputs = prompt(name, model, rows=2)
    cache, straight = (prefilled(model, inputs, new_cache(model)) for _ in range(2))
    cache.activate_past_recording()
    feed(model, cache, 60)
    feed(model, cache, 61, 62, 63, 64, 65, 66, 67)
    feed(model, cache, 68)
    cache.crop(-8)
    assert apart(feed(model, cache, 70, 71), feed(model, straight, 60, 70, 71)[:, 1:]) <= TOLERANCE
    cache.crop(0)
    stored = [layer.keys.shape[2] for layer in cache.layers]
    assert apart(feed(model, cache, 72), feed(model, straight, 72)) <= TOLERANCE
    cache.crop(-1)
    assert [layer.keys.shape[2] for layer in cache.layers] == stored
    assert apart(feed(model, cache, 73), feed(model, straight, 73)) > 0  # of another sequence
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 4


def test_a_crop_beyond_the_window_is_refused_as_transformers_refuses_it(name, setup):
    model = patched(name, setup)
    inputs = prompt(name, model)
    theirs = prefilled(plain(name), inputs, new_cache(model))
    with pytest.raises((RuntimeError, ValueError)):
        theirs.crop(-2)
    cache, straight = (prefilled(model, inputs, new_cache(model)) for _ in range(2))
    with pytest.raises(CacheStateError, match="sliding window"):
        cache.crop(-1)
    assert spans(find(model).text(model).config, 1)[0] is not None  # it was asked first, so nothing has changed
    assert torch.equal(feed(model, cache, 60), feed(model, straight, 60))
    full = [layer for layer in cache.layers if not layer.is_sliding]
    full[0].crop(-1)  # as in a cache whose first layers have no window
    with pytest.raises(CacheStateError, match="different numbers of tokens"):
        feed(model, cache, 61)


@records
def test_a_crop_to_what_was_forgotten_before_is_refused(name):
    model = patched(name, "none")
    cache = prefilled(model, prompt(name, model), new_cache(model))
    cache.activate_past_recording()
    with pytest.raises(CacheStateError, match="forgotten"):
        cache.crop(-2)


@pytest.mark.skipif(TRANSFORMERS.release < (5, 20), reason="a positive number was a length")
def test_a_crop_by_a_positive_number_is_refused():
    model = patched(FAMILIES[0], "none")
    cache = prefilled(model, prompt(FAMILIES[0], model), new_cache(model))
    with pytest.raises(ConfigError, match="negative"):
        cache.crop(3)


# -- caches that are handed over --------------------------------------------------------------------------------------


def test_a_cache_that_the_unpatched_model_filled_goes_on(name, window):
    model, before = patched(name, "none", window), seeing(clone(name), window)
    inputs = prompt(name, before)
    first = answer(before, inputs, 3)
    text = continued(registry()[name], model, torch.cat([first.sequences, torch.tensor([REPEATED])], 1))
    for given in (text, with_a_new_picture(registry()[name], model, "image", first.sequences)):
        if given is not text:
            skip_where_transformers_cannot_go_on(name, inputs, given)
        theirs = answer(before, given, 4, past_key_values=copy.deepcopy(first.cache))
        ours = answer(model, given, 4, past_key_values=copy.deepcopy(first.cache))
        assert torch.equal(ours.logits, theirs.logits)
        assert [layer.keys.shape for layer in ours.cache.layers] == [layer.keys.shape for layer in theirs.cache.layers]


def test_a_new_picture_is_pruned_over_a_cache_that_the_unpatched_model_filled(name, dropping):
    """As over a cache that a patched model filled without dropping anything."""
    before, inputs = plain(name), prompt(name, plain(name))
    first = answer(before, inputs, 3)
    again = with_a_new_picture(registry()[name], before, "image", first.sequences)
    skip_where_transformers_cannot_go_on(name, inputs, again)
    never_forgets = answer(before, inputs, 3, past_key_values=DynamicCache()).cache
    ours = [
        answer(patched(name, dropping), again, 4, past_key_values=copy.deepcopy(cache)).logits
        for cache in (first.cache, never_forgets)
    ]
    assert apart(*ours) <= TOLERANCE


def test_an_unpatched_model_goes_on_where_nothing_was_dropped_and_is_refused_elsewhere(name, setup):
    model, inputs = patched(name, setup), prompt(name, plain(name))
    first = answer(model, inputs, 3)
    again = continued(registry()[name], model, torch.cat([first.sequences, torch.tensor([REPEATED])], 1))
    straight = answer(model, again, 4, past_key_values=copy.deepcopy(first.cache))
    mustdrop.unpatch(model)
    if setup in WHOLE:
        ours = answer(model, again, 4, past_key_values=first.cache)
        theirs = answer(model, again, 4, past_key_values=answer(model, inputs, 3).cache)
        assert torch.equal(ours.logits, theirs.logits)
        assert torch.equal(straight.logits, theirs.logits)
        assert [layer.keys.shape for layer in ours.cache.layers] == [layer.keys.shape for layer in theirs.cache.layers]
        return
    before = [(layer.get_seq_length(), layer.keys.shape) for layer in first.cache.layers]
    with pytest.raises(CacheStateError, match="not patched"):
        answer(model, again, 4, past_key_values=first.cache)
    assert [(layer.get_seq_length(), layer.keys.shape) for layer in first.cache.layers] == before
    mustdrop.patch(model, **SETUPS[setup])
    assert torch.equal(answer(model, again, 4, past_key_values=first.cache).logits, straight.logits)


# -- cache policies ---------------------------------------------------------------------------------------------------


def test_the_budget_goes_to_entries_that_a_later_token_sees(name, policy, window):
    """So it does not matter whether a cache forgets what has left a window."""
    model = mustdrop.patch(seeing(clone(name), window), **POLICIES[policy])
    inputs = prompt(name, model)
    forgets = answer(model, inputs, 6)
    never = answer(model, inputs, 6, past_key_values=DynamicCache())
    assert apart(forgets.logits, never.logits) <= TOLERANCE
    model = mustdrop.patch(seeing(clone(name), window), **POLICIES[policy])
    cache = prefilled(model, inputs, DynamicCache())
    seen = spans(find(model).text(model).config, len(cache.layers))
    end, kept = inputs["input_ids"].shape[1], 0
    vision = mustdrop.trace(model).total[0]
    for layer, span in zip(cache.layers, seen, strict=True):
        held = layer.slot_positions()[layer.slot_vision()]
        kept += len(held)
        assert len(held) < vision
        assert span is None or (held >= span.reach(end)).all()
    if policy == "tgvkv":  # what a layer with a window cannot use goes to the others
        assert kept == 4 * len(cache.layers)


def test_entries_that_leave_while_decoding_do_not_depend_on_what_a_cache_forgets(name, evicting):
    model = mustdrop.patch(clone(name), **EVICTING[evicting])
    inputs = prompt(name, model, rows=2)
    forgets, never = (answer(model, inputs, 9, past_key_values=cache) for cache in (new_cache(model), DynamicCache()))
    assert apart(forgets.logits, never.logits) <= TOLERANCE


def test_a_padded_row_keeps_what_the_row_alone_keeps(name, policy):
    """A chunk begins behind the padding, and a window counts tokens from its end."""
    model, adapter = mustdrop.patch(clone(name), **POLICIES[policy]), registry()[name]
    rows = (("image",), (), ("image", "image"))
    together = answer(model, batch(adapter, model, rows), 4)
    kept = mustdrop.trace(model).kv_vision
    for r, row in enumerate(rows):
        alone = answer(model, batch(adapter, model, (row,), first=r), 4)
        assert torch.equal(mustdrop.trace(model).kv_vision[:, 0], kept[:, r])
        assert apart(alone.logits[0], together.logits[r]) <= TOLERANCE


# -- flash attention --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("flash")
def test_flash_attention_is_refused_where_a_window_is_shorter_than_the_sequence():
    """A family may have a window in one of its models alone, so that its adapter cannot say."""
    inputs = prompt("llava_next", plain("llava_next"))
    length = inputs["input_ids"].shape[1]
    for window, steps in ((length, 1), (8, 0)):
        model = mustdrop.patch(seeing(fake_flash.use(clone("llava_next")), window), "fastv", keep=0.5)
        with pytest.raises(UnsupportedOptionError, match=f"window of {window}.*positions"):
            answer(model, inputs, steps)
        if steps:
            assert answer(model, inputs, 0).logits.isfinite().all()


def test_a_compiled_pass_scores_what_the_window_shows(name):
    """Words see a part of the picture where a layer has a window: what they do not see has no score."""
    model = seeing(clone(name), 12)
    mustdrop.patch(model, prefill=PrefillPruner(survivors=(0.8, 0.6), layers=(0, 2)))
    inputs = prompt(name, model)  # of one row, so that the same rows score in every prompt
    plainly = left(model, inputs)
    mustdrop.compile(model, backend="eager")
    assert not differences(plainly, left(model, inputs), TOLERANCE)
