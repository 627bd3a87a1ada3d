"""Calls inside calls, calls by other doors, calls that fail: each has its own state and gives what it gives alone."""

from __future__ import annotations

import copy
import functools
import itertools
import threading

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner, patching
from mustdrop.errors import NotPatchedError, UnsupportedOptionError
from mustdrop.patching import unpatched
from mustdrop.registry import registry, resolve
from support.builders import IMAGE, LLAMA, answer, batch, clone, defaults, plain, vision_positions
from support.masking_check import TOLERANCE, distance, patched
from support.oracle import MaskedOracle, hidden_by
from support.versions import CACHE

MERGING = {
    "vision": VisionStagePruner(window=3),
    "prefill": PrefillPruner(keep=1 / 3),
    "decode": DecodeCachePruner(),
}
EVICTING = {"prefill": PrefillPruner(keep=0.6), "decode": DecodeCachePruner(keep=6, interval=1)}
SETUPS = pytest.mark.parametrize("setup", [MERGING, EVICTING], ids=["merging", "evicting"])
#: A module of the model in each part of a pass, its hook runs in the middle of it.
PLACES = (
    "model.vision_tower",
    "model.vision_tower.encoder.layers.2",
    "model.multi_modal_projector",
    "model.language_model",
    "model.language_model.layers.0",
    "model.language_model.layers.3.self_attn",
    "lm_head",
)

MEDIA = ("pixel_values", "mm_encoder_outputs")  # releases encode media before the first pass or in it


class Calling:
    """A logits processor that calls something at every step."""

    def __init__(self, call):
        self.call, self.made = call, []

    def __call__(self, ids, scores):
        with torch.no_grad():
            self.made.append(self.call(ids))
        return scores


def cost(trace):
    """What a trace says, in numbers that can be compared."""
    return trace.tokens.tolist(), trace.kv_lengths.tolist(), trace.flops.actual, trace.kv_bytes.actual, trace.kernels


def run(model, inputs, call=None, **options):
    """An answer, what its trace says, and what was called on the way."""
    calling = Calling(call or (lambda ids: None))
    made = answer(model, inputs, steps=3, logits_processor=LogitsProcessorList([calling]), **options)
    return made, cost(mustdrop.trace(model)), calling.made


def same(a, b):
    return torch.equal(a.logits, b.logits) and torch.equal(a.sequences, b.sequences)


def place(model, name):
    """A module by its name; layers of the tower sit one level deeper before transformers 5.6."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_submodule(name.replace("tower.", "tower.vision_model."))


# ------------------------------------------------------------------------------------------------- calls inside calls


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str
)
def test_what_a_logits_processor_calls_gives_what_it_gives_alone(options):
    """Another prompt, text alone, the prompt of the call itself with its answer so far, and features by hand."""
    model, outer = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=3)
    inner, text = batch(LLAMA, (2, 1), seed=4), batch(LLAMA, (0,), seed=5)
    expected, kept, _ = run(model, outer, **options)

    def calls(ids):
        rows = len(ids)
        own = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        own["pixel_values"] = outer["pixel_values"].repeat(rows, 1, 1, 1)
        return [
            *(model(**given).logits for given in (inner, text, own)),
            model.get_image_features(inner["pixel_values"]).pooler_output[0],
            ids,
        ]

    got, again, made = run(model, outer, calls, **options)
    assert same(got, expected)
    assert again == kept
    for found in made:
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(found[:3], calls(found[-1])[:3], strict=True))
            assert torch.equal(found[3].isnan(), calls(found[-1])[3].isnan())


@SETUPS
@pytest.mark.parametrize("name", PLACES)
def test_what_a_hook_in_the_middle_of_a_pass_calls_gives_what_it_gives_alone(name, setup):
    model, outer, inner = patched(LLAMA, **setup), batch(LLAMA, (1, 2), seed=6), batch(LLAMA, (2,), seed=7)
    expected, kept, _ = run(model, outer)
    alone, other = answer(model, inner, steps=3), answer(model, outer, steps=2)
    with torch.no_grad():
        logits, states = model(**inner).logits, model.model(**inner).last_hidden_state
    made = []

    def hook(*_):
        handle.remove()
        with torch.no_grad():
            made.extend([model(**inner).logits, model.forward(**inner).logits])
            if name != "model.vision_tower":  # there the base model's pass has not reached the text
                made.append(model.model(**inner).last_hidden_state)
        made.extend([answer(model, inner, steps=3), answer(model, outer, steps=2)])

    handle = place(model, name).register_forward_hook(hook)
    got, again, _ = run(model, outer)
    assert same(got, expected)
    assert again == kept
    assert torch.equal(made[0], logits)
    assert torch.equal(made[1], logits)
    assert len(made) == 4 or torch.equal(made[2], states)
    assert same(made[-2], alone)
    assert same(made[-1], other)


def test_calls_nest_as_deep_as_they_like():
    model, inputs = patched(LLAMA, **EVICTING), [batch(LLAMA, (n,), seed=n) for n in (1, 2, 3)]
    expected = [run(model, given)[0] for given in inputs]
    found = {}

    def level(n):
        made, _, _ = run(model, inputs[n], (lambda ids: level(n + 1)) if n < 2 else None)
        found.setdefault(n, []).append(made)

    level(0)
    assert mustdrop.trace(model).total.tolist() == [36]
    assert [len(found[n]) for n in range(3)] == [1, 4, 16]
    assert all(same(made, expected[n]) for n in range(3) for made in found[n])


@SETUPS
@pytest.mark.parametrize("negative", [False, True], ids=["last_token", "negative_prompt"])
def test_guidance_equals_guidance_on_the_masked_model(setup, negative):
    """Classifier-free guidance: the unconditional branch is a call of its own, and the trace is the prompt's."""
    if setup is EVICTING:
        setup = {"prefill": PrefillPruner(keep=0.6)}  # what is evicted depends on the answer, which guidance changes
    model, inputs = patched(LLAMA, **{**setup, "decode": DecodeCachePruner(cascade=False)}), batch(LLAMA, (1,), seed=8)
    options = {"guidance_scale": 1.5}
    if negative:
        options["negative_prompt_ids"] = torch.tensor([[1, 5, 9, 7]])
    plainly = answer(model, inputs, steps=3)
    kept = cost(mustdrop.trace(model))
    ours, trace = answer(model, inputs, steps=3, **options), mustdrop.trace(model)
    assert cost(trace) == kept
    assert torch.equal(ours.logits[:, 0], plainly.logits[:, 0])
    guided = run(model, inputs, **options)[0]
    assert same(guided, ours)
    branch = {"input_ids": options.get("negative_prompt_ids", inputs["input_ids"][:, -1:])}
    with torch.no_grad():  # what the branch says first is what the model says of it alone
        first = plain(LLAMA)(**branch).logits[:, -1].log_softmax(-1)
    mixed = 1.5 * (plainly.logits[:, 0].log_softmax(-1) - first) + first
    assert torch.equal(mixed.argmax(-1), ours.sequences[:, -4])


def test_a_model_that_drafts_for_itself():
    model, inputs = patched(LLAMA, prefill=PrefillPruner(keep=0.5)), batch(LLAMA, (1,), seed=9, after=(8,))
    expected, kept = answer(model, inputs, steps=7), cost(mustdrop.trace(model))
    got = model.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=model)
    assert torch.equal(got, expected.sequences)
    assert cost(mustdrop.trace(model))[0] == kept[0]


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "without_cache"])
def test_a_decoding_loop_of_the_callers_own(cached):
    """`custom_generate`: passes that nothing prepares belong to the call, by its cache or by its media."""
    model, inputs = patched(LLAMA, **(EVICTING if cached else MERGING)), batch(LLAMA, (1,), seed=10)
    expected, kept, _ = run(model, inputs, use_cache=cached)

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        media = {key: value for key, value in kwargs.items() if key in MEDIA}
        given, cache, length = {"input_ids": input_ids, **media}, {}, input_ids.shape[1]
        while True:
            out = model(**given, **cache, use_cache=cached)
            token = out.logits[:, -1].argmax(-1)[:, None]
            input_ids = torch.cat([input_ids, token], 1)
            if input_ids.shape[1] == length + 4:
                return input_ids
            model(**batch(LLAMA, (2,), seed=11))
            given, cache = ({"input_ids": token}, {CACHE: out[CACHE]}) if cached else (given, {})
            given["input_ids"] = token if cached else input_ids

    got = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=cached, custom_generate=loop)
    assert torch.equal(got, expected.sequences)
    assert cost(mustdrop.trace(model)) == kept


def test_what_an_inner_call_raises_leaves_the_outer_one_intact():
    model, outer, inner = patched(LLAMA, **EVICTING), batch(LLAMA, (1,), seed=12), batch(LLAMA, (2,), seed=13)
    expected, kept, _ = run(model, outer)
    layer = model.model.language_model.layers[2]

    def explode(*_):
        raise RuntimeError("on purpose")

    def interrupt(*_):
        raise KeyboardInterrupt

    def calls(ids):
        for hook, error in ((explode, RuntimeError), (interrupt, KeyboardInterrupt)):
            for call in (lambda: model(**inner), lambda: model.forward(**inner), lambda: answer(model, inner)):
                handle = layer.register_forward_hook(hook)
                with pytest.raises(error):
                    call()
                handle.remove()
        with pytest.raises(ValueError, match="image"):
            model(input_ids=inner["input_ids"][:, :-20], pixel_values=inner["pixel_values"][:1])
        with pytest.raises(UnsupportedOptionError):
            model.generate(**inner, prefill_chunk_size=4)

    got, again, _ = run(model, outer, calls)
    assert same(got, expected)
    assert again == kept


# ------------------------------------------------------------------------------------------------------ other doors


@SETUPS
def test_every_door_gives_the_same(setup):
    """By name and by position, by `__call__` and `forward`, of the model, the base model and a deep copy."""
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, (2, 1), seed=14)
    ids, pixels, mask = (inputs[name] for name in ("input_ids", "pixel_values", "attention_mask"))
    with torch.no_grad():
        expected, kept = model(**inputs).logits, cost(mustdrop.trace(model))
        doors = [model, model.forward, copy.deepcopy(model), copy.deepcopy(model).forward]
        for door in doors:
            assert torch.equal(door(ids, pixels, mask).logits, expected)
            assert torch.equal(door(ids, pixels, attention_mask=mask, return_dict=False)[0], expected)
        assert cost(mustdrop.trace(model)) == kept
        for door in (model.model, model.model.forward, model.base_model):
            assert torch.equal(model.lm_head(door(ids, pixels, mask).last_hidden_state), expected)
            assert cost(mustdrop.trace(model)) == kept


def test_forward_masks_the_loss_as_the_call_does():
    model, inputs = patched(LLAMA, prefill=PrefillPruner(keep=0.5)), batch(LLAMA, (1, 2), seed=15)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels.masked_fill_(inputs["attention_mask"].cumsum(1) == 1, -100)  # padding predicts nothing either
    ids, pixels, mask = (inputs[name] for name in ("input_ids", "pixel_values", "attention_mask"))
    with torch.no_grad():
        loss = model(**inputs, labels=labels).loss
        assert torch.equal(model.forward(**inputs, labels=labels).loss, loss)
        assert torch.equal(model(ids, pixels, mask, None, None, None, None, None, labels).loss, loss)
        hidden = hidden_by(mustdrop.trace(model), ids, LLAMA.n_layers)
        with MaskedOracle(plain(LLAMA), hidden):
            logits = plain(LLAMA)(**inputs).logits
    wanted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for row in range(2):
        gone = hidden.prefill[-1, row]
        wanted[row, gone] = -100
    assert distance(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())) <= TOLERANCE


def test_the_text_model_alone_goes_on_with_a_pruned_cache():
    """By position, by name, as ids and as embeddings, through `forward`."""
    model, inputs = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=16)
    made, token = [], torch.tensor([[7]])
    text = model.model.language_model
    for door in (text, text.forward):
        for given in ({"input_ids": token}, {"inputs_embeds": text.get_input_embeddings()(token)}):
            for positional in (False, True):
                if positional and "inputs_embeds" in given:
                    continue
                with torch.no_grad():
                    cache = getattr(model(**inputs, use_cache=True), CACHE)
                    if positional:
                        states = door(token, None, None, cache).last_hidden_state
                    else:
                        states = door(**given, **{CACHE: cache}).last_hidden_state
                    made.append(model.lm_head(states))
    with torch.no_grad():
        cache = getattr(model(**inputs, use_cache=True), CACHE)
        expected = model(input_ids=token, **{CACHE: cache}).logits
    assert all(torch.equal(each, expected) for each in made)


def test_wrong_arguments_raise_what_they_raise_unpatched():
    model, ids = patched(LLAMA, **MERGING), batch(LLAMA, (0,))["input_ids"]
    for call in (model, model.forward, model.model, model.generate):
        with pytest.raises(TypeError, match="multiple values"):
            call(ids, **{"inputs" if call is model.generate else "input_ids": ids})
    with pytest.raises(TypeError, match="too many"):
        model(*[None] * 40)


REFUSED = {
    "prefill_chunk_size": ({"prefill_chunk_size": 8}, MERGING),
    "cache_implementation": ({"cache_implementation": "offloaded"}, MERGING),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 2}, EVICTING),
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_is_refused_is_refused_however_it_comes(option):
    settings, setup = REFUSED[option]
    model, inputs = patched(LLAMA, **setup), batch(LLAMA, (1,), seed=17)
    ids, rest = inputs["input_ids"], {key: value for key, value in inputs.items() if key != "input_ids"}
    config = GenerationConfig(max_new_tokens=2, pad_token_id=0, **settings)
    bare = GenerationConfig(max_new_tokens=2, pad_token_id=0)
    refused = pytest.raises(
        UnsupportedOptionError, match=(next(iter(settings.values())) == 2 and option) or r"Leave it|leave it"
    )
    with refused:
        model.generate(**inputs, **settings)
    with refused:
        model.generate(**inputs, generation_config=config)
    with refused:
        model.generate(ids, config, **rest)
    with refused:
        model.generate(ids, bare, **rest, **settings)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with refused:
        model.generate(ids, max_new_tokens=2, **rest)
    with refused:  # a configuration that says nothing leaves it to the model's
        model.generate(ids, bare, **rest)
    assert model.generate(ids, bare, **rest, **dict.fromkeys(settings)).shape[1] == ids.shape[1] + 2


def test_a_cache_that_files_of_older_models_ask_for_is_left_out_as_transformers_does():
    model, inputs = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=17)
    expected = answer(model, inputs)
    model.generation_config.cache_implementation = "hybrid"
    assert same(answer(model, inputs), expected)


def test_an_assistant_by_position_is_refused_where_drafts_would_evict():
    model, ids = patched(LLAMA, **EVICTING), batch(LLAMA, (0,))["input_ids"]
    with pytest.raises(UnsupportedOptionError, match="assistant_model"):
        model.generate(ids, None, None, None, None, None, clone())


def test_what_others_wrap_around_forward_stays_theirs():
    """What accelerate does to `forward`, before a model is patched and after."""
    for first in (True, False):
        model, inputs = clone(), batch(LLAMA, (1,), seed=18)
        expected, seen = answer(model, inputs), []

        def wrap(model=model, seen=seen):
            inner = model.forward

            @functools.wraps(inner)
            def wrapper(*args, **kwargs):
                seen.append(1)
                return inner(*args, **kwargs)

            object.__setattr__(model, "forward", wrapper)

        if first:
            wrap()
        mustdrop.patch(model, **MERGING)
        if not first:
            wrap()
        assert same(answer(model, inputs), answer(patched(LLAMA, **MERGING), inputs))
        mustdrop.unpatch(model)
        seen.clear()
        assert same(answer(model, inputs), expected)
        assert seen


# ------------------------------------------------------------------------------------------------------------ traces


def test_a_trace_outlives_the_patch():
    model, inputs = clone(), batch(LLAMA, (1,), seed=19)
    with mustdrop.patched(model, **MERGING):
        answer(model, inputs)
        inside = mustdrop.trace(model)
    assert mustdrop.trace(model) is inside
    answer(model, inputs)  # unpatched: leaves none
    assert mustdrop.trace(model) is inside
    with mustdrop.patched(model, **EVICTING):
        with pytest.raises(NotPatchedError, match="not run"):
            mustdrop.trace(model)
        answer(model, inputs)
        outer = mustdrop.trace(model)
        with mustdrop.patched(model, **MERGING):
            answer(model, inputs)
            inner = mustdrop.trace(model)
        assert mustdrop.trace(model) is inner
        with mustdrop.patched(model, **MERGING):
            pass
        assert mustdrop.trace(model) is inner
        with unpatched(model):
            answer(model, inputs)
            assert mustdrop.trace(model) is inner
        assert mustdrop.trace(model) is inner
        answer(model, inputs)
        assert cost(mustdrop.trace(model)) == cost(outer)
    mustdrop.patch(model, **MERGING)
    with pytest.raises(NotPatchedError, match="not run"):
        mustdrop.trace(model)
    answer(model, inputs)
    mustdrop.unpatch(model)
    assert cost(mustdrop.trace(model)) == cost(inside)


@pytest.mark.parametrize("how", ["refused", "raised", "forward", "interrupted", "base"])
def test_a_call_that_fails_leaves_no_stale_trace(how):
    model, inputs = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=20)
    answer(model, inputs)
    kind = KeyboardInterrupt if how == "interrupted" else RuntimeError

    def explode(*_):
        raise kind("on purpose")

    handle = None if how == "refused" else model.model.language_model.layers[1].register_forward_hook(explode)
    call = {"forward": model, "base": model.model}.get(how, model.generate)
    with pytest.raises(UnsupportedOptionError if how == "refused" else kind), torch.no_grad():
        call(**inputs, **({"prefill_chunk_size": 4} if how == "refused" else {}))
    if handle is not None:
        handle.remove()
    with pytest.raises(NotPatchedError, match=r"last call.*failed.*(prefill_chunk_size|on purpose)"):
        mustdrop.trace(model)
    answer(model, inputs)
    assert mustdrop.trace(model).dropped_anything


def test_an_interrupted_forward_leaves_nothing_behind():
    model, inputs, other = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=21), batch(LLAMA, (2,), seed=22)
    with torch.no_grad():
        expected = model(**other).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    for name, register in itertools.product(PLACES, ("register_forward_hook", "register_forward_pre_hook")):
        for call in (model, model.forward, model.model):
            handle = getattr(place(model, name), register)(interrupt)
            if name == "lm_head" and call is model.model:
                handle.remove()
                continue
            with pytest.raises(KeyboardInterrupt), torch.no_grad():
                call(**inputs)
            handle.remove()
            with torch.no_grad():
                assert torch.equal(model(**other).logits, expected)
            assert mustdrop.trace(model).total.tolist() == [72]


@pytest.mark.parametrize("door", ["model", "forward", "base", "text"])
@pytest.mark.parametrize("when", ["before the forward", "after it", "after it, in front of ours"])
def test_an_interrupt_around_an_outermost_forward_leaves_nothing_behind(door, when):
    """In a hook on the very module that is called: torch tells no other hook of it, and no call is around it."""
    model, inputs, other = clone(LLAMA), batch(LLAMA, (1,), seed=21), batch(LLAMA, (2,), seed=22)

    def interrupt(*_):
        if angry:
            raise KeyboardInterrupt

    angry = False
    module = {"base": model.model, "text": model.model.language_model}.get(door, model)
    if when.endswith("ours"):
        module.register_forward_hook(interrupt)
    mustdrop.patch(model, **MERGING)
    if not when.endswith("ours"):
        (module.register_forward_pre_hook if when.startswith("before") else module.register_forward_hook)(interrupt)
    call = model.forward if door == "forward" else module
    text = {"inputs_embeds": torch.zeros(1, 4, model.config.text_config.hidden_size)}
    given = text if door == "text" else inputs
    with torch.no_grad():
        expected, states = model(**other).logits, model.model(**other).last_hidden_state
        first = answer(model, other, steps=2).sequences
    for again in (
        lambda: torch.equal(model(**other).logits, expected),
        lambda: torch.equal(model.model(**other).last_hidden_state, states),
        lambda: torch.equal(answer(model, other, steps=2).sequences, first),
    ):
        for _ in range(2):  # twice in a row: nothing may pile up
            angry = True
            with pytest.raises(KeyboardInterrupt), torch.no_grad():
                call(**given)
            angry = False
            if door != "text" and when != "after it":
                with pytest.raises(NotPatchedError, match=r"last call.*failed"):
                    mustdrop.last_trace(model)
        with torch.no_grad():
            assert again()
        assert mustdrop.last_trace(model).total.tolist() == [72]
        assert patching._runtime(model).local.aside == []


def test_a_call_inside_a_hook_in_front_of_the_forward_keeps_the_call_around_it():
    """It looks like an interrupted one: the pass has begun, and its forward has not."""
    model, outer, inner = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=21), batch(LLAMA, (2,), seed=22)
    with torch.no_grad():
        expected, alone = model(**outer).logits, model(**inner).logits
    made = []

    def nested(*_):
        handle.remove()
        made.append(model(**inner).logits)

    for module in (model, model.model, model.model.language_model):
        handle = module.register_forward_pre_hook(nested)
        with torch.no_grad():
            assert torch.equal(model(**outer).logits, expected)
        assert torch.equal(made.pop(), alone)
        assert mustdrop.last_trace(model).total.tolist() == [36]


def test_an_interrupt_before_an_inner_call_has_begun_leaves_nothing_behind():
    """Nobody is told of it: the hook in front of the inner call's model raises, in a hook of the outer one."""
    model, outer, inner = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=21), batch(LLAMA, (2,), seed=22)
    with torch.no_grad():
        expected = model(**outer).logits
    handles = []

    def interrupt(*_):
        raise KeyboardInterrupt

    def nested(*_):
        handles.append(model.register_forward_pre_hook(interrupt))
        model(**inner)

    handles.append(model.model.language_model.layers[2].register_forward_hook(nested))
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(**outer)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert torch.equal(model(**outer).logits, expected)
    assert mustdrop.trace(model).total.tolist() == [36]


def test_a_trace_of_another_thread_is_the_newest_until_this_one_has_a_newer():
    model, one, two = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=23), batch(LLAMA, (2,), seed=24)

    def elsewhere(inputs):
        thread = threading.Thread(target=answer, args=(model, inputs))
        thread.start()
        thread.join()
        return mustdrop.trace(model).total.tolist()

    assert elsewhere(two) == [72]  # this thread has none
    answer(model, one)
    assert mustdrop.trace(model).total.tolist() == [36]
    assert elsewhere(two) == [72]
    answer(model, one)
    assert mustdrop.trace(model).total.tolist() == [36]


def test_threads_that_run_side_by_side_see_their_own_traces():
    """A call that began before this thread's ended is not newer, although it ended later."""
    model, one, two = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=25), batch(LLAMA, (2,), seed=26)
    began, go_on = threading.Event(), threading.Event()

    def wait(ids):
        began.set()
        assert go_on.wait(60)

    thread = threading.Thread(target=run, args=(model, two, wait))
    thread.start()
    assert began.wait(60)
    answer(model, one)
    go_on.set()
    thread.join()
    assert mustdrop.trace(model).total.tolist() == [36]


def test_a_prompt_that_continues_a_cache_inside_another_call():
    """A chat of two turns runs inside a logits processor: the cache of the inner call is not that of the outer one."""
    model, outer, inner = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=27), batch(LLAMA, (1,), seed=28)
    expected, kept, _ = run(model, outer)

    def chat(ids):
        first = answer(model, inner, steps=2, past_key_values=DynamicCache(config=model.config.text_config))
        grown = torch.cat([first.sequences, torch.tensor([[5, 6]])], 1)
        return answer(
            model, {"input_ids": grown, "attention_mask": torch.ones_like(grown)}, 2, past_key_values=first.cache
        )

    alone = chat(None)
    got, again, made = run(model, outer, chat)
    assert same(got, expected)
    assert again == kept
    assert all(same(each, alone) for each in made)
    assert len(vision_positions(inner["input_ids"], 0)) == int((inner["input_ids"] == IMAGE).sum())


# ---------------------------------------------------------------------------------------------- defaults of the process


@pytest.mark.parametrize("default", ["dtype", "device"])
@pytest.mark.parametrize("method", [name for name in mustdrop.methods() if resolve(name).input is None])
def test_methods_do_not_look_at_defaults_of_the_process(method, default):
    """Every method, its trace and its table, under another default type and another default device."""
    knobs = {"keep": 0.6} if "keep" in registry()[method].model_fields else {}
    model, inputs = mustdrop.patch(clone(), method, **knobs), batch(LLAMA, (2,), seed=29)
    expected, kept = answer(model, inputs, steps=3), cost(mustdrop.trace(model))
    with defaults(default):
        got = answer(model, inputs, steps=3)
        trace = mustdrop.trace(model)
        assert cost(trace) == kept
        assert trace.to_dict()["tokens"] == kept[0]
        assert str(trace)
        assert trace.assignment(0).dtype == trace.kept(0).dtype == torch.long
    assert same(got, expected)


@pytest.mark.parametrize("default", ["dtype", "device"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}],
    ids=lambda options: next(iter(options)),
)
def test_options_do_not_look_at_defaults_of_the_process(options, default):
    model, inputs = patched(LLAMA, **MERGING), batch(LLAMA, (1,), seed=30)
    untouched = answer(clone(), inputs, steps=3, **options)
    expected = answer(model, inputs, steps=3, **options)
    with defaults(default):
        try:
            plainly = answer(clone(), inputs, steps=3, **options)
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"the unpatched model raises: {error}")
        got = answer(model, inputs, steps=3, **options)
    assert same(got, expected) or not same(plainly, untouched)


@pytest.mark.parametrize("default", ["dtype", "device"])
def test_a_training_step_does_not_look_at_defaults_of_the_process(default):
    model, inputs = patched(LLAMA, **MERGING), batch(LLAMA, (1, 2), seed=31)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = model(**inputs, labels=labels).loss
    with defaults(default):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    assert torch.equal(loss, expected)
