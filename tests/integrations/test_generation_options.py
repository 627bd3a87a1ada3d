"""`generate` with everything it takes: decoding methods, streamers, criteria, processors, inference mode.

Greedy, sampling, beams, `num_return_sequences`, chats and threads are in tests/conformance/test_generation.py, prompt
lookup and assisted decoding also in tests/test_errors.py. Transformers 5 has given group beam search, constrained beam
search, contrastive search and DoLa to repositories on its hub: the last two read the hidden states of single layers
and are refused.
"""

from __future__ import annotations

import contextlib
import inspect

import pytest
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner, errors
from support.builders import IMAGE, LLAMA, answer, batch, clone, plain
from support.masking_check import TOLERANCE, assert_dropping_equals_masking, distance, merged_features, patched
from support.oracle import MaskedOracle, hidden_by

MERGING = {"vision": VisionStagePruner(window=3), "prefill": PrefillPruner(keep=1 / 3), "decode": DecodeCachePruner()}
EVICTING = {"prefill": PrefillPruner(keep=0.6), "decode": DecodeCachePruner(keep=6, interval=2)}
KEEPING = {"vision": VisionStagePruner(window=3), "prefill": PrefillPruner(keep=1 / 3)}
SETUPS = pytest.mark.parametrize("setup", [MERGING, EVICTING], ids=["merging", "evicting"])


class Ban(LogitsProcessor):
    """Forbids even tokens, so that the greedy answer changes."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores


class AfterThree(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length + 3)


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": LogitsProcessorList([Ban()])},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 4, "eos_token_id": 5},
        {"bad_words_ids": [[7], [9]]},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 3, "early_stopping": True, "repetition_penalty": 1.2},
    ],
    ids=lambda options: next(iter(options)),
)
@SETUPS
def test_processors_and_search_options_equal_the_oracles(setup, options):
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, (1, 1), seed=3)
    assert_dropping_equals_masking(model, inputs, vision=setup.get("vision"), decode=setup["decode"], **options)


@SETUPS
def test_stopping_criteria_end_the_answer_where_the_oracle_ends_it(setup):
    inputs = batch(LLAMA, (1, 2), seed=4)
    criteria = StoppingCriteriaList([AfterThree(inputs["input_ids"].shape[1])])
    both = assert_dropping_equals_masking(
        patched(LLAMA, **setup),
        inputs,
        vision=setup.get("vision"),
        decode=setup["decode"],
        stopping_criteria=criteria,
    )
    assert both.ours.logits.shape[1] == 3


@SETUPS
def test_a_streamer_is_given_the_answer_token_by_token(setup):
    class Heard:
        def __init__(self):
            self.parts, self.ended = [], 0

        def put(self, value):
            self.parts.append(value.flatten().tolist())

        def end(self):
            self.ended += 1

    model, inputs, heard = patched(LLAMA, **setup), batch(LLAMA, (1,), seed=5), Heard()
    expected = answer(model, inputs)
    got = answer(model, inputs, streamer=heard)
    assert torch.equal(got.sequences, expected.sequences)
    assert heard.ended == 1
    assert [token for part in heard.parts for token in part] == expected.sequences[0].tolist()
    assert [len(part) for part in heard.parts[1:]] == [1] * 9


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
@SETUPS
def test_inference_mode_changes_no_bit_and_leaves_nothing_behind(setup, mode):
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, (1, 2), seed=6)
    expected = answer(model, inputs)
    with mode():
        out = model.generate(
            **inputs, max_new_tokens=9, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        logits = torch.stack(out.logits, 1)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(out.sequences, expected.sequences)
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0), -100)
    model(**inputs, labels=labels).loss.backward()  # nothing that inference mode made is in the way of gradients


@SETUPS
def test_a_cache_made_in_inference_mode_goes_on_outside_it(setup):
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, (1,), seed=7)
    caches = []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        caches.append(out)
    ids = torch.cat([caches[0].sequences, torch.tensor([[11, 12, 13]])], 1)
    later = [
        answer(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": c.past_key_values})
        for c in caches
    ]
    assert torch.equal(later[0].logits, later[1].logits)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0, "temperature": 1.3},
        {"top_k": 20, "top_p": 0.9},
        {"min_p": 0.02},
        {"typical_p": 0.9},
        {"num_beams": 2, "top_k": 0},
    ],
    ids=lambda options: "-".join(options),
)
def test_sampling_with_a_seed_draws_what_the_oracle_draws(options):
    model, inputs = patched(LLAMA, **MERGING), batch(LLAMA, (1, 1), seed=8)
    options = {"do_sample": True, **options}
    repeat = options.get("num_beams", 1)
    torch.manual_seed(3)
    ours = answer(model, inputs, **options)
    trace = mustdrop.trace(model)
    ids = inputs["input_ids"].repeat_interleave(repeat, 0)
    hidden = hidden_by(trace, ids, LLAMA.n_layers, cascade_from=2)
    features = merged_features(LLAMA, inputs, trace, MERGING["vision"], repeat=repeat)
    torch.manual_seed(3)
    with MaskedOracle(plain(LLAMA), hidden, features):
        theirs = answer(plain(LLAMA), inputs, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert distance(ours.logits, theirs.logits) <= TOLERANCE
    if "generator" in inspect.signature(transformers.GenerationMixin.generate).parameters:
        pytest.fail("generate takes a generator now: test it")


@pytest.mark.parametrize("helper", ["the_plain_model", "a_patched_model", "prompt_lookup"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
def test_assisted_decoding(helper, sample):
    """Drafts change how fast an answer comes, not what it is; with sampling they change which numbers are drawn."""
    inputs = batch(LLAMA, (1,), seed=9, after=(8,))
    inputs["input_ids"][:, -3:] = inputs["input_ids"][:, -8:-5]
    model, end = patched(LLAMA, **KEEPING), {"eos_token_id": 206}
    if helper == "prompt_lookup":
        options = {"prompt_lookup_num_tokens": 3}
    else:
        assistant = clone() if helper == "the_plain_model" else patched(LLAMA, prefill=PrefillPruner(keep=0.5))
        options = {"assistant_model": assistant}
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(model.generate(**inputs, max_new_tokens=12, do_sample=sample, **end, **options))
    assert torch.equal(*runs)
    assert mustdrop.trace(model).dropped_anything
    if not sample:
        assert torch.equal(runs[0], answer(model, inputs, steps=11, **end).sequences)


@pytest.mark.parametrize("option", [{"dola_layers": "high"}, {"penalty_alpha": 0.6, "top_k": 4}], ids=str)
@pytest.mark.parametrize("where", ["argument", "config"])
def test_searches_that_read_single_layers_are_refused_before_any_work(option, where):
    model, inputs, work = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=10), []
    given = dict(option)
    if where == "config":
        given = {"generation_config": transformers.GenerationConfig(max_new_tokens=2, pad_token_id=0, **option)}
        if getattr(given["generation_config"], next(iter(option)), None) is None:
            pytest.skip("this release of transformers keeps no such setting")
    handle = model.model.vision_tower.register_forward_hook(lambda *_: work.append(1))
    with pytest.raises(errors.UnsupportedOptionError, match=f"{next(iter(option))}.*Leave it out"):
        model.generate(**inputs, **given)
    handle.remove()
    assert not work
    answer(model, inputs, steps=1)


@pytest.mark.skipif(not hasattr(transformers, "ContinuousBatchingConfig"), reason="not in this transformers")
def test_continuous_batching_takes_texts_and_gives_the_plain_answer():
    """It takes ids and no images, so there is nothing to drop; its paged cache is left alone."""
    small = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)  # else a share of all memory
    model, prompts = patched(LLAMA, **EVICTING), [batch(LLAMA, (0,), seed=seed)["input_ids"] for seed in (12, 13)]
    config = transformers.GenerationConfig(max_new_tokens=4, eos_token_id=-1, do_sample=False)
    out = model.generate_batch(
        [ids[0].tolist() for ids in prompts], generation_config=config, continuous_batching_config=small
    )
    got = sorted(result.generated_tokens for result in out.values())
    expected = [answer(plain(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, steps=3) for ids in prompts]
    assert got == sorted(one.sequences[0, -4:].tolist() for one in expected)
