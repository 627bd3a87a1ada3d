"""Entries that leave at the end of the prefill, in every way to call a patched model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.errors import UnsupportedOptionError
from mustdrop.method import find
from mustdrop.pruners import AllRows, LastQuery, ObservationWindow
from support.builders import IMAGE, LLAMA, MISTRAL, QWEN2, SIGLIP, answer, batch, clone, image, plain, row_alone
from support.masking_check import TOLERANCE, assert_dropping_equals_masking, distance, merged_features, patched
from support.oracle import CacheWatch, Hidden, MaskedOracle, hidden_by
from support.versions import BEAMS_MIX_IMAGES

FLASH = "flash_attention_2"
ROWS = (1, 1) if BEAMS_MIX_IMAGES else (1, 2)
SNAPKV, H2O, TGVKV = (find(name, keep=7).decode for name in ("snapkv", "h2o", "tgvkv"))
SETUPS = {
    "snapkv": {"decode": SNAPKV},
    "tgvkv": {"decode": TGVKV},
    "h2o": {"decode": H2O},
    "h2o waits": {"decode": find("h2o", keep=7, interval=2).decode},
    "last query": {"decode": DecodeCachePruner(keep=0.3, score=LastQuery(), interval=3)},
    "window average": {"decode": DecodeCachePruner(keep=0.3, score=ObservationWindow(), interval=1)},
    "behind a prefill": {"prefill": PrefillPruner(keep=0.6), "decode": SNAPKV},
    "behind a cascade from layer 0": {
        "prefill": PrefillPruner(keep=0.6),
        "decode": DecodeCachePruner(keep=5, full_layers=0, score=AllRows(), after_prefill=True),
    },
    "without a cascade": {
        "prefill": PrefillPruner(keep=0.6),
        "decode": DecodeCachePruner(keep=5, cascade=False, score=find("tgvkv").decode.score, after_prefill=True),
    },
    "all three": {"vision": VisionStagePruner(window=3), "prefill": PrefillPruner(keep=1 / 3), "decode": TGVKV},
    "selection and eviction": {
        "vision": VisionStagePruner(window=None, keep=20),
        "decode": find("h2o", keep=7, interval=2).decode,
    },
}
ONCE = [name for name, setup in SETUPS.items() if setup["decode"].after_prefill]


@pytest.mark.parametrize(
    ("variant", "attn", "images"),
    [(LLAMA, "sdpa", (1,)), (MISTRAL, "eager", (2, 0, 1)), (QWEN2, FLASH, (1, 2)), (SIGLIP, "sdpa", (1, 0, 2))],
    ids=str,
)
@pytest.mark.parametrize("setup", SETUPS)
def test_dropping_equals_masking(setup, variant, attn, images, request):
    if attn == FLASH:
        request.getfixturevalue("flash")
    setup = SETUPS[setup]
    model, inputs = patched(variant, attn, **setup), batch(variant, images, seed=3)
    options = {name: setup.get(name) for name in ("vision", "decode")}
    both = assert_dropping_equals_masking(model, inputs, variant, attn, **options)
    counts = setup["decode"].counts(both.trace.total)
    assert torch.all(both.trace.equal_entries <= counts)
    assert torch.all(both.trace.kv_vision.sum(1) > 0)


@pytest.mark.parametrize("setup", ["snapkv", "all three", "h2o waits", "without a cascade"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 0}], ids=str
)
def test_beams_and_samples(setup, options):
    setup, inputs = SETUPS[setup], batch(LLAMA, ROWS, seed=8)
    sockets = {name: setup.get(name) for name in ("vision", "decode")}
    if "do_sample" not in options:
        assert_dropping_equals_masking(patched(LLAMA, **setup), inputs, LLAMA, **sockets, **options)
        return
    torch.manual_seed(0)
    answer(patched(LLAMA, **setup), inputs, 4, **options)  # rows of the expanded batch have caches of their own


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("setup", ONCE)
def test_static_caches_hold_less(setup, attn):
    setup, inputs = SETUPS[setup], batch(LLAMA, (2, 0, 1), seed=3)
    model = patched(LLAMA, attn, **setup)
    sockets = {name: setup.get(name) for name in ("vision", "decode")}
    both = assert_dropping_equals_masking(model, inputs, LLAMA, attn, **sockets, cache_implementation="static")
    assert isinstance(both.ours.cache, StaticCache)
    growing = answer(patched(LLAMA, attn, **setup), inputs)
    assert distance(both.ours.logits, growing.logits) <= TOLERANCE
    text = int(inputs["attention_mask"].sum(1).max())
    assert all(layer.keys.shape[2] < text for layer in both.ours.cache.layers[2:])


@pytest.mark.parametrize("setup", [name for name in SETUPS if name not in ONCE])
def test_static_caches_are_refused_where_entries_leave_while_decoding(setup):
    model, inputs, ran = patched(LLAMA, **SETUPS[setup]), batch(LLAMA), []
    model.model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(UnsupportedOptionError, match="after_prefill"):
        answer(model, inputs, cache_implementation="static")
    with pytest.raises(UnsupportedOptionError, match="after_prefill"):
        answer(model, inputs, past_key_values=StaticCache(config=model.config.get_text_config(), max_cache_len=160))
    assert not ran


def test_drafts_are_taken_where_entries_leave_once_and_refused_elsewhere():
    inputs, end = batch(LLAMA, (1,), seed=9, after=(8,)), {"eos_token_id": 206}  # before 5.17 the lookup needs one
    inputs["input_ids"][:, -3:] = inputs["input_ids"][:, -8:-5]  # so that the first pass has drafts behind the prompt
    for name in ("snapkv", "h2o", "tgvkv"):
        model = patched(LLAMA, **SETUPS[name])
        expected = answer(model, inputs, 8, **end)
        drafted = answer(model, inputs, 8, prompt_lookup_num_tokens=3, **end)
        assert torch.equal(drafted.sequences, expected.sequences)
    with pytest.raises(UnsupportedOptionError, match="prompt_lookup_num_tokens"):
        answer(patched(LLAMA, **SETUPS["h2o waits"]), inputs, 8, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("setup", ["snapkv", "tgvkv", "h2o"])
@pytest.mark.parametrize("images", [(1,), (0, 1)], ids=str)
def test_a_padded_row_is_the_row_alone(setup, images):
    model = patched(LLAMA, **SETUPS[setup])
    inputs = batch(LLAMA, (*images, 2), seed=4)
    together = answer(model, inputs)
    kept = mustdrop.trace(model).kv_vision
    for row in range(len(images) + 1):
        alone = answer(model, row_alone(inputs, row))
        assert distance(together.logits[row], alone.logits[0]) <= TOLERANCE
        assert torch.equal(mustdrop.trace(model).kv_vision[:, 0], kept[:, row])


WORDS = ((31, 57, 86, 110, 12), (19, 23), (44, 45, 46, 47))
CHATS = {
    **SETUPS,
    "generated rows": {"decode": DecodeCachePruner(keep=5, interval=2)},
    "the last rows": {"decode": DecodeCachePruner(keep=5, score=ObservationWindow(window=2), interval=1)},
}


def _chat(model, rows, picture, length, pad):
    """Logits of three turns, the third with a new picture for each row if `picture`, and what the trace says then.

    Row r of a batch is padded to `length` words per turn, where `pad`: before them, inside of the sequence.
    """
    inputs = batch(LLAMA, (1, 0, 2), seed=4, after=(3, 5, 4))
    mask = inputs["attention_mask"]
    if not pad:
        inputs, mask = (alone := row_alone(inputs, rows[0])), alone["attention_mask"]
    with torch.no_grad():
        out, found = answer(model, inputs, 0), []  # the words of the second turn rank, before the first entry leaves
        found.append(out.logits)
        for turn in range(2):
            pictures = picture and turn == 1
            lines = [[*([IMAGE] * LLAMA.n_vision if pictures else []), *WORDS[(r + turn) % 3]] for r in rows]
            longest = max(map(len, lines)) if pad else len(lines[0])
            words = torch.tensor([[0] * (longest - len(line)) + line for line in lines])
            more = torch.tensor([[0] * (longest - len(line)) + [1] * len(line) for line in lines])
            ids = torch.cat([out.sequences, words], 1)
            mask = torch.cat([mask, torch.ones(len(rows), ids.shape[1] - longest - mask.shape[1]).long(), more], 1)
            given = {"input_ids": ids, "attention_mask": mask, "past_key_values": out.cache}
            if pictures:
                given["pixel_values"] = torch.stack([image(LLAMA, 500 + r) for r in rows])
            out = answer(model, given, 3)
            found.append(out.logits)
    return found, [layer.slot_vision() & (layer.slot_positions() >= 0) for layer in out.cache.layers]


@pytest.mark.parametrize("picture", [False, True], ids=["text_only", "new_image"])
@pytest.mark.parametrize("setup", CHATS)
def test_a_padded_row_is_the_row_alone_over_several_turns(setup, picture):
    model = patched(LLAMA, **CHATS[setup])
    together, stored = _chat(model, (0, 1, 2), picture, 5, True)
    for row in range(3):
        alone, own = _chat(model, (row,), picture, 0, False)
        for turn, (ours, theirs) in enumerate(zip(alone, together, strict=True)):
            assert distance(ours[0], theirs[row]) <= TOLERANCE, turn
        assert [int(a.sum()) for a in own] == [int(b[row].sum()) for b in stored]


@pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("method", ["snapkv", "h2o", "tgvkv"])
def test_keeping_everything_changes_no_bit(method, options, attn):
    inputs = batch(LLAMA, (1, 0, 2), seed=1)
    ours = answer(patched(LLAMA, attn, method=method, keep=1.0), inputs, **options)
    # a model of its own: a model remembers how long its longest static cache was
    assert torch.equal(ours.logits, answer(clone(LLAMA, attn), inputs, **options).logits)


@pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")
@pytest.mark.parametrize("method", ["snapkv", "h2o", "tgvkv"])
def test_without_a_picture_or_without_a_cache_nothing_happens(method):
    model, reference = patched(LLAMA, method=method, keep=3), plain(LLAMA)
    words = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    assert torch.equal(answer(model, words).logits, answer(reference, words).logits)
    inputs = batch(LLAMA, (1, 2), seed=1)
    with torch.no_grad():
        assert torch.equal(model(**inputs, use_cache=False).logits, reference(**inputs, use_cache=False).logits)
        assert torch.equal(model(**inputs).logits, reference(**inputs).logits)  # the cut comes after the last layer


@pytest.mark.parametrize("new_image", [False, True], ids=["text_only", "new_image"])
@pytest.mark.parametrize("setup", ["snapkv", "tgvkv", "all three", "h2o waits"])
def test_a_chat_goes_on(setup, new_image):
    """Two turns: what a step does not hold of either picture is what the oracle hides."""
    setup = SETUPS[setup]
    model, reference = patched(LLAMA, **setup), plain(LLAMA)
    cache = DynamicCache(config=model.config.get_text_config())
    inputs = batch(LLAMA, (1,), seed=17)
    first = answer(model, {**inputs, "past_key_values": cache}, 4)
    features = [merged_features(LLAMA, inputs, mustdrop.trace(model), setup.get("vision"))]
    middle = [IMAGE] * LLAMA.n_vision if new_image else []
    ids = torch.cat([first.sequences, torch.tensor([[31, 57, *middle, 86, 110, 12]])], 1)
    following = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if new_image:
        following["pixel_values"] = image(LLAMA, 500)[None]
    held = copy.deepcopy(first.cache)
    with CacheWatch(model) as watch:
        second = answer(model, {**following, "past_key_values": first.cache}, 4)
    trace = mustdrop.trace(model)
    fresh = ids.clone()
    fresh[:, : inputs["input_ids"].shape[1]] = 0
    features.append(merged_features(LLAMA, {**following, "input_ids": fresh}, trace, setup.get("vision")))
    whole = DynamicCache(config=reference.config.get_text_config())
    before = _first_turn(setup, inputs, whole, features[0], held)
    own = hidden_by(trace, fresh, LLAMA.n_layers) if new_image else Hidden(*[torch.zeros(6, *ids.shape).bool()] * 2)
    old = torch.nn.functional.pad(before, (0, ids.shape[1] - before.shape[2]))
    now = Hidden(own.prefill | old, own.prefill | old)
    with MaskedOracle(reference, now, features[1]) as oracle:
        answer(reference, {**following, "past_key_values": copy.deepcopy(whole)}, 0)
    hidden = watch.hidden_while_decoding(oracle.prompt_keys, ids, now)
    with MaskedOracle(reference, hidden, features[1]):
        expected = answer(reference, {**following, "past_key_values": whole}, 4)
    assert distance(second.logits, expected.logits) <= TOLERANCE
    if new_image and setup["decode"].after_prefill:
        gone = hidden.steps[1][:, 0, ids[0] == IMAGE].sum(1)
        assert (2 * LLAMA.n_vision - gone).float().mean() <= 7


def _first_turn(setup, inputs, whole, features, held):
    """Run the oracle's first turn into `whole`; (L, B, S) what the patched cache `held` lacked at its end."""
    model = patched(LLAMA, **setup)
    with CacheWatch(model) as watch:
        answer(model, inputs, 4)
    hidden = hidden_by(mustdrop.trace(model), inputs["input_ids"], LLAMA.n_layers)
    with MaskedOracle(plain(LLAMA), hidden, features) as oracle:
        answer(plain(LLAMA), inputs, 0)
    full = watch.hidden_while_decoding(oracle.prompt_keys, inputs["input_ids"], Hidden(hidden.prefill, hidden.prefill))
    with MaskedOracle(plain(LLAMA), full, features):
        answer(plain(LLAMA), {**inputs, "past_key_values": whole}, 4)
    at_the_end = {i: layer.keys for i, layer in enumerate(held.layers)}
    during = Hidden(hidden.prefill, hidden.prefill)
    return CacheWatch.hidden_at(at_the_end, oracle.prompt_keys, inputs["input_ids"], during)


@pytest.mark.parametrize("setup", ["snapkv", "tgvkv", "h2o"])
def test_a_prompt_fed_in_chunks_is_cut_after_the_chunk_with_the_picture(setup):
    inputs, model = batch(LLAMA, (1,), seed=12), patched(LLAMA, **SETUPS[setup])
    end = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 3
    head = {name: value[:, :end] for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        cache = model(**head, pixel_values=inputs["pixel_values"], use_cache=True).past_key_values
        assert mustdrop.trace(model).equal_entries.tolist() == [7.0]
        tail = model(input_ids=inputs["input_ids"][:, end:], past_key_values=cache).logits
    length = inputs["input_ids"].shape[1]
    stored = sum(layer.keys.shape[2] for layer in cache.layers)
    assert stored == LLAMA.n_layers * (length - LLAMA.n_vision + 7)
    assert cache.get_seq_length() == length
    assert torch.isfinite(tail).all()


def test_cropping_a_cut_cache_takes_only_what_was_generated():
    inputs, model = batch(LLAMA, (1,), seed=12), patched(LLAMA, **SETUPS["h2o waits"])
    cache = answer(model, inputs, 1).cache  # prompt rows are known, nothing has left yet
    cache.crop(-1)
    length = inputs["input_ids"].shape[1]
    assert all(layer.attended.shape == layer.queries.shape == (1, length) for layer in cache.layers)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[9]])], 1)
    again = answer(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}, 4)
    assert all(layer.keys.shape[2] < length for layer in again.cache.layers)
