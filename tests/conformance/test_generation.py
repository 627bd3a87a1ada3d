"""Every way to call a patched model gives what the masked oracle gives."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import DynamicCache

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from support.builders import (
    IMAGE,
    LLAMA,
    MISTRAL,
    QWEN2,
    SIGLIP,
    answer,
    batch,
    clone,
    image,
    plain,
    row_alone,
    vision_positions,
)
from support.masking_check import TOLERANCE, assert_dropping_equals_masking, distance, merged_features, patched
from support.oracle import Hidden, MaskedOracle, hidden_by
from support.versions import BEAMS_MIX_IMAGES

FLASH = "flash_attention_2"
ALL_THREE = {
    "vision": VisionStagePruner(window=3),
    "prefill": PrefillPruner(keep=1 / 3),
    "decode": DecodeCachePruner(),
}
EVICTING = {"prefill": PrefillPruner(keep=0.6), "decode": DecodeCachePruner(keep=6, interval=2)}
SELECTING = {"vision": VisionStagePruner(window=None, keep=11), "prefill": PrefillPruner(scale=1.0, bias=2.0)}
THRESHOLDS = {"prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02)}
ROWS = (1, 1) if BEAMS_MIX_IMAGES else (1, 2)


@pytest.mark.parametrize(
    ("setup", "variant", "attn"),
    [(ALL_THREE, LLAMA, "sdpa"), (EVICTING, MISTRAL, "eager"), (SELECTING, QWEN2, "sdpa"), (THRESHOLDS, LLAMA, FLASH)],
    ids=["all_three", "evicting", "selecting", "thresholds"],
)
def test_beam_search(setup, variant, attn, request):
    if attn == FLASH:
        request.getfixturevalue("flash")
    both = assert_dropping_equals_masking(
        patched(variant, attn, **setup),
        batch(variant, ROWS, seed=8),
        variant,
        attn,
        vision=setup.get("vision"),
        decode=setup.get("decode"),
        num_beams=3,
    )
    assert both.trace.tokens.shape == (variant.n_layers, 6)


@pytest.mark.parametrize("setup", [ALL_THREE, EVICTING], ids=["all_three", "evicting"])
def test_sampling_draws_the_same_tokens_as_the_oracle(setup):
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, ROWS, seed=9)
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 0, "temperature": 1.3}
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ours = answer(model, inputs, **options)
        trace = mustdrop.trace(model)
        assert trace.tokens.shape[1] == ours.sequences.shape[0] == 6
        if setup is ALL_THREE:
            ids = inputs["input_ids"].repeat_interleave(3, 0)
            hidden = hidden_by(trace, ids, LLAMA.n_layers, cascade_from=2)
            features = merged_features(LLAMA, inputs, trace, setup["vision"], repeat=3)
            torch.manual_seed(seed)
            with MaskedOracle(plain(LLAMA), hidden, features):
                theirs = answer(plain(LLAMA), inputs, **options)
            assert torch.equal(ours.sequences, theirs.sequences)
            assert distance(ours.logits, theirs.logits) <= TOLERANCE
        torch.manual_seed(seed)
        assert torch.equal(ours.sequences, answer(model, inputs, **options).sequences)
        draws.append(ours.sequences)
    assert not torch.equal(*draws)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("setup", [SELECTING, THRESHOLDS], ids=["selecting", "thresholds"])
def test_without_a_cache_every_step_is_the_same(setup, attn):
    """Each step runs the whole prompt again; only the question scores, so the same tokens go every time."""
    model, inputs = patched(LLAMA, attn, **setup), batch(LLAMA, (1, 2), seed=10)
    cached = answer(model, inputs, steps=4)
    kept = mustdrop.trace(model)
    uncached = answer(model, inputs, steps=4, use_cache=False)
    assert distance(cached.logits, uncached.logits) <= TOLERANCE
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.equal(kept.tokens, mustdrop.trace(model).tokens)
    assert uncached.cache is None


def test_without_a_cache_the_first_step_is_the_same_under_all_three_stages():
    model, inputs = patched(LLAMA, **ALL_THREE), batch(LLAMA, (1, 2), seed=10)
    cached = answer(model, inputs, steps=3)
    uncached = answer(model, inputs, steps=3, use_cache=False)
    assert distance(cached.logits[:, 0], uncached.logits[:, 0]) <= TOLERANCE
    assert torch.equal(cached.sequences[:, :-3], uncached.sequences[:, :-3])


@pytest.mark.parametrize("setup", [THRESHOLDS, SELECTING, ALL_THREE], ids=["thresholds", "selecting", "all_three"])
def test_a_forward_with_labels_gives_the_masked_models_loss_over_the_text(setup):
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, (1, 2), seed=11, after=(6, 6))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    labels[inputs["attention_mask"] == 0] = -100
    labels[:, :-3] = -100  # the answer
    with torch.no_grad():
        ours, trace = model(**inputs, labels=labels), mustdrop.trace(model)
        hidden = hidden_by(trace, inputs["input_ids"], LLAMA.n_layers)
        with MaskedOracle(plain(LLAMA), hidden, merged_features(LLAMA, inputs, trace, setup.get("vision"))):
            theirs = plain(LLAMA)(**inputs, labels=labels)
    assert hidden.anything
    assert (ours.loss - theirs.loss).abs() <= TOLERANCE
    assert ours.loss != plain(LLAMA)(**inputs, labels=labels).loss


def test_labels_decide_nothing():
    """What is dropped is the same without labels, with labels of the answer alone, and with labels everywhere."""
    model, inputs = patched(LLAMA, prefill=PrefillPruner(keep=0.5)), batch(LLAMA, (1, 2), seed=12, after=(9, 9))
    ids = inputs["input_ids"]
    answers = ids.clone()
    answers[:, :-4] = -100
    kept = []
    for labels in (None, answers, ids, torch.full_like(ids, -100)):
        with torch.no_grad():
            model(**inputs, labels=labels)
        kept.append([mustdrop.trace(model).kept(LLAMA.n_layers, row) for row in range(2)])
    for other in kept[1:]:
        assert all(map(torch.equal, kept[0], other))


@pytest.mark.parametrize("how", ["labels", "shift_labels"])
def test_dropped_tokens_leave_the_loss_however_labels_come(how):
    """Labels everywhere: positions that a dropped token would predict do not count."""
    model, inputs = patched(LLAMA, prefill=PrefillPruner(keep=0.5)), batch(LLAMA, (2,), seed=13)
    ids = inputs["input_ids"]
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        if how == "labels":
            loss = model(**inputs, labels=ids).loss
        else:
            loss = model(**inputs, labels=ids, shift_labels=shifted).loss
        logits = model(**inputs).logits
    where = (ids[0] == IMAGE).nonzero()[:, 0]
    gone = torch.ones(len(where), dtype=torch.bool)
    gone[mustdrop.trace(model).kept(LLAMA.n_layers)] = False
    assert gone.any()
    wanted = shifted.index_fill(1, where[gone], -100)
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits[0], wanted[0]), atol=1e-6)


def test_gradients_reach_every_part_of_a_patched_model():
    model, inputs = patched(LLAMA, **ALL_THREE), batch(LLAMA, (1, 2), seed=13)
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    model(**inputs, labels=labels).loss.backward()
    for part in (model.model.multi_modal_projector, model.model.language_model, model.lm_head):
        gradients = [p.grad for p in part.parameters()]
        assert all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("setup", [ALL_THREE, EVICTING, SELECTING], ids=["all_three", "evicting", "selecting"])
def test_a_second_generate_gives_the_same_result(setup):
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, (1, 2), seed=14)
    first = answer(model, inputs)
    answer(model, batch(LLAMA, (2, 0, 1), seed=15), steps=3)
    second = answer(model, inputs)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.sequences, second.sequences)


def test_a_prompt_without_an_image_is_untouched():
    model, inputs = patched(LLAMA, **ALL_THREE), batch(LLAMA, (0, 0), seed=16)
    ours, theirs = answer(model, inputs), answer(plain(LLAMA), inputs)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert mustdrop.trace(model).total.tolist() == [0, 0]


# ------------------------------------------------------------------------------------------------------------- chats


def turn(model, inputs, cache, steps=5):
    return answer(model, {**inputs, "past_key_values": cache}, steps)


def next_turn(inputs, sequences, new_image):
    """The ids of a chat so far, six new words, and a new image among them if asked for."""
    rows = len(sequences)
    words = torch.randint(2, IMAGE, (rows, 6), generator=torch.Generator().manual_seed(77))
    if new_image:
        words = torch.cat([words[:, :2], torch.full((rows, LLAMA.n_vision), IMAGE), words[:, 2:]], 1)
    ids = torch.cat([sequences, words], 1)
    more = torch.ones(rows, ids.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    following = {"input_ids": ids, "attention_mask": torch.cat([inputs["attention_mask"], more], 1)}
    if new_image:
        following["pixel_values"] = torch.stack([image(LLAMA, 500 + r) for r in range(rows)])
    return following


def of_this_turn(inputs, following):
    """The inputs of a later turn, without the images of the turns before."""
    ids = following["input_ids"].clone()
    ids[:, : inputs["input_ids"].shape[1]] = 0
    return {**following, "input_ids": ids}


def later_hidden(first, trace, inputs, following, new_image, cascade_from):
    """What is hidden in the second turn: what the first turn dropped, and what the second drops of its own image."""
    n_layers, length = LLAMA.n_layers, following["input_ids"].shape[1]
    old = torch.zeros(n_layers, *following["input_ids"].shape, dtype=torch.bool)
    old[..., : inputs["input_ids"].shape[1]] = first.decode
    prefill, decode = old.clone(), old.clone()
    if new_image:
        fresh = of_this_turn(inputs, following)["input_ids"]
        assert (fresh == IMAGE).sum(1).tolist() == trace.total.tolist()
        own = hidden_by(trace, fresh, n_layers, cascade_from=cascade_from)
        prefill, decode = prefill | own.prefill, decode | own.decode
    assert prefill.shape[2] == length
    return Hidden(prefill, decode)


@pytest.mark.parametrize("new_image", [False, True], ids=["text_only", "new_image"])
@pytest.mark.parametrize("images", [(1,), (1, 1)], ids=["one_row", "two_rows"])
@pytest.mark.parametrize(
    ("setup", "attn"),
    [
        (THRESHOLDS, "sdpa"),
        ({**SELECTING, "decode": DecodeCachePruner()}, "eager"),
        (THRESHOLDS, FLASH),
        (ALL_THREE, "sdpa"),
    ],
    ids=["thresholds", "selecting", "flash", "all_three"],
)
def test_a_chat_continues_from_its_cache(setup, attn, images, new_image, request):
    if attn == FLASH:
        request.getfixturevalue("flash")
    cascade = 2 if "decode" in setup else None
    model, oracle_model = patched(LLAMA, attn, **setup), plain(LLAMA, "sdpa" if attn == FLASH else attn)
    inputs = batch(LLAMA, images, seed=17)
    first = turn(model, inputs, DynamicCache(config=model.config.get_text_config()))
    trace = mustdrop.trace(model)
    hidden = hidden_by(trace, inputs["input_ids"], LLAMA.n_layers, cascade_from=cascade)
    features = merged_features(LLAMA, inputs, trace, setup.get("vision"))
    following = next_turn(inputs, first.sequences, new_image)
    second = turn(model, following, first.cache)
    trace = mustdrop.trace(model)
    assert hidden.anything
    with MaskedOracle(oracle_model, hidden, features):
        expected = turn(oracle_model, inputs, DynamicCache(config=oracle_model.config.get_text_config()))
    assert torch.equal(first.sequences, expected.sequences)
    later = later_hidden(hidden, trace, inputs, following, new_image, cascade)
    features = merged_features(LLAMA, of_this_turn(inputs, following), trace, setup.get("vision"))
    with MaskedOracle(oracle_model, later, features):
        expected = turn(oracle_model, following, expected.cache)
    assert distance(second.logits, expected.logits) <= TOLERANCE
    assert torch.equal(second.sequences, expected.sequences)


def test_a_chat_that_began_unpatched_continues_patched():
    inputs, oracle_model = batch(LLAMA, (1,), seed=18), plain(LLAMA)
    first = turn(oracle_model, inputs, DynamicCache(config=oracle_model.config.get_text_config()))
    again = turn(oracle_model, inputs, DynamicCache(config=oracle_model.config.get_text_config()))
    following = next_turn(inputs, first.sequences, new_image=True)
    model = patched(LLAMA, **THRESHOLDS)
    second = turn(model, following, first.cache)
    nothing = torch.zeros(LLAMA.n_layers, *inputs["input_ids"].shape, dtype=torch.bool)
    hidden = later_hidden(Hidden(nothing, nothing), mustdrop.trace(model), inputs, following, True, None)
    assert hidden.anything
    with MaskedOracle(oracle_model, hidden):
        expected = turn(oracle_model, following, again.cache)
    assert distance(second.logits, expected.logits) <= TOLERANCE
    assert torch.equal(second.sequences, expected.sequences)


def test_the_first_image_may_stay_in_a_long_chat_with_evictions():
    """Evictions of the first turn hold in the second: its cache never grows back."""
    model, inputs = patched(LLAMA, **EVICTING), batch(LLAMA, (1,), seed=19)
    first = turn(model, inputs, DynamicCache(config=model.config.get_text_config()), steps=6)
    text = int((inputs["input_ids"] != IMAGE).sum())
    assert [layer.keys.shape[2] for layer in first.cache.layers] == [text + 6 + 6] * LLAMA.n_layers
    following = next_turn(inputs, first.sequences, new_image=False)
    second = turn(model, following, first.cache, steps=3)
    stored = following["input_ids"].shape[1] - LLAMA.n_vision + 6 + 3
    assert [layer.keys.shape[2] for layer in second.cache.layers] == [stored] * LLAMA.n_layers
    assert torch.isfinite(second.logits).all()


# ----------------------------------------------------------------------------------------------------------- threads


def test_two_threads_generate_on_one_patched_model():
    model = patched(LLAMA, **ALL_THREE)
    prompts = [batch(LLAMA, (1, 2), seed=20), batch(LLAMA, (2, 0, 1), seed=21)]
    expected = [answer(model, prompt) for prompt in prompts]
    start, found, failed = threading.Barrier(2), [[], []], []

    def work(which):
        try:
            start.wait()
            for _ in range(4):
                found[which].append((answer(model, prompts[which]), mustdrop.trace(model)))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for which in range(2):
        assert len(found[which]) == 4
        for got, trace in found[which]:
            assert torch.equal(got.logits, expected[which].logits)
            assert torch.equal(got.sequences, expected[which].sequences)
            assert trace.total.tolist() == [36, 72] if which == 0 else [72, 0, 36]


# ------------------------------------------------------------------------------------------------- other call styles


@pytest.mark.parametrize("setup", [ALL_THREE, EVICTING], ids=["all_three", "evicting"])
def test_a_hand_written_decode_loop_equals_generate(setup):
    model, inputs = patched(LLAMA, **setup), row_alone(batch(LLAMA, (1,), seed=22), 0)
    expected = answer(model, inputs, steps=6)
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        logits = [out.logits[:, -1]]
        for _ in range(6):
            out = model(input_ids=logits[-1].argmax(-1)[:, None], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[:, -1])
    assert distance(torch.stack(logits, 1), expected.logits) <= TOLERANCE


@pytest.mark.parametrize("setup", [ALL_THREE, THRESHOLDS], ids=["all_three", "thresholds"])
def test_logits_to_keep_is_honoured(setup):
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, (1, 2), seed=23)
    with torch.no_grad():
        whole, last = model(**inputs).logits, model(**inputs, logits_to_keep=2).logits
    assert last.shape[1] == 2
    assert distance(whole[:, -2:], last) <= TOLERANCE


def test_vision_tokens_from_a_tower_that_keeps_its_cls_row():
    """``vision_feature_select_strategy="full"`` on CLIP hands over 37 rows per image; the CLS row is never dropped."""
    model, inputs = patched(LLAMA, vision=VisionStagePruner(window=None, keep=11)), batch(LLAMA, (1,), seed=24)
    ids = inputs["input_ids"][0].tolist()
    ids.insert(ids.index(IMAGE), IMAGE)
    inputs |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    for each in (model, plain(LLAMA)):
        with torch.no_grad():
            logits = each(**inputs, vision_feature_select_strategy="full").logits
        assert torch.isfinite(logits[:, -1]).all()
        if each is model:
            ours, trace = logits, mustdrop.trace(model)
    kept = trace.kept(0)
    assert trace.total.tolist() == [37]
    assert len(kept) in (11, 12)
    assert kept[0] == 0
    hidden = hidden_by(trace, inputs["input_ids"], LLAMA.n_layers)
    with torch.no_grad(), MaskedOracle(plain(LLAMA), hidden):
        theirs = plain(LLAMA)(**inputs, vision_feature_select_strategy="full").logits
    where = vision_positions(inputs["input_ids"], 0)[kept]
    left = torch.cat([(inputs["input_ids"][0] != IMAGE).nonzero()[:, 0], where])
    assert distance(ours[0, left], theirs[0, left]) <= TOLERANCE


def test_inputs_embeds_without_ids_and_with_features_already_in_place_run_unpruned_or_are_refused():
    """A caller who embeds by hand gets the plain model's numbers or an error, never wrong numbers."""
    model, inputs = patched(LLAMA, **THRESHOLDS), batch(LLAMA, (0, 0), seed=25)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        ours = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
        theirs = plain(LLAMA)(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", [LLAMA, SIGLIP], ids=str)
def test_bfloat16_runs_and_keeps_the_budget(variant):
    model = mustdrop.patch(clone(variant)).to(torch.bfloat16)
    inputs = batch(variant, (1, 2), seed=26)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    out, trace = answer(model, inputs), mustdrop.trace(model)
    assert out.logits.dtype == torch.bfloat16 or torch.isfinite(out.logits).all()
    assert torch.isfinite(out.logits.float()).all()
    assert all(layer.keys.dtype == torch.bfloat16 for layer in out.cache.layers)
    assert (trace.equal_tokens <= trace.total / 3 + 1e-4).all()
    assert (trace.equal_tokens > trace.total / 3 - 1).all()
