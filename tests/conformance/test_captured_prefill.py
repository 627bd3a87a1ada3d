"""`mustdrop.compile`: a replayed pass equals the pass, and nothing stale or of another shape is ever replayed.

On a CUDA device the recordings are CUDA graphs. Here they are graphs of operations on the same static storage
(`support.recorder`), which run none of the Python of the pass; outputs hold NaN whenever nobody should look at them.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import DynamicCache

import mustdrop
from mustdrop import PrefillPruner
from mustdrop.errors import CaptureWarning, ConfigError, NotPatchedError, UnsupportedOptionError
from mustdrop.patching import _runtime
from support.builders import LLAMA, QWEN2, answer, batch, clone
from support.passes import differences, left, of_cache, of_trace
from support.recorder import Recorder, record

SMALL = {"keep": 16}


def patched(method="mustdrop", variant=LLAMA, **settings):
    return mustdrop.patch(clone(variant), method, **{**SMALL, **settings})


def replays(engine):
    return [recording.replays for recording in engine.capturer.made]


@pytest.mark.parametrize("method", ["mustdrop", "mustdrop+", "fastv", "visionzip", "dart", "random", "none"])
def test_another_picture_and_another_question_are_not_the_recorded_ones(method):
    model = mustdrop.patch(clone(LLAMA), method, **({} if method == "none" else SMALL))
    prompts = [batch(LLAMA, (1, 2), seed=seed) for seed in (1, 2, 1)]
    expected = [left(model, inputs) for inputs in prompts]
    engine = record(model)
    got = [left(model, inputs) for inputs in prompts]
    assert not any(differences(a, b) for a, b in zip(expected, got, strict=True))
    assert replays(engine) == [3]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_goes_on_from_what_was_replayed(cache):
    model, options = patched(), {"cache_implementation": cache}
    prompts = [batch(LLAMA, (1, 2), seed=seed) for seed in (1, 2)]

    def answers():
        out = [answer(model, inputs, 3, **options) for inputs in prompts]
        return [of_cache(one.cache) | {"logits": one.logits, "sequences": one.sequences} for one in out], of_trace(
            model
        )

    expected = answers()
    engine = record(model)
    for a, b in zip(expected[0], (got := answers())[0], strict=True):
        assert not differences(a, b)
    assert not differences(expected[1], got[1])
    assert replays(engine) == [2]


def test_shapes_take_turns_and_the_oldest_recording_goes():
    model = patched()
    shapes = [
        {"images": (1,)}, {"images": (1, 1)}, {"images": (1,), "after": (9,)}, {"images": (1,), "before": (7,)},
        {"images": (1, 2)},
    ]  # fmt: skip
    order = [0, 1, 0, 2, 3, 4, 1, 0, 0]
    prompts = [batch(LLAMA, seed=k, **shapes[which]) for k, which in enumerate(order)]
    expected = [left(model, inputs) for inputs in prompts]
    engine = record(model, graphs=2)
    for a, inputs in zip(expected, prompts, strict=True):
        assert not differences(a, left(model, inputs))
        assert len(engine.recorded) <= 2
    assert replays(engine) == [2, 1, 1, 1, 1, 1, 2]  # the newest of two were kept, and what had gone was made anew
    assert not engine.said


def test_where_the_picture_stands_is_no_part_of_the_shape():
    model = patched()
    prompts = [batch(LLAMA, (1, 1), before=pair, after=(9 - pair[0], 9 - pair[1])) for pair in ((3, 3), (3, 3))]
    prompts.append(batch(LLAMA, (1, 1), before=(3, 3), after=(6, 6), seed=4))
    expected = [left(model, inputs) for inputs in prompts]
    engine = record(model)
    assert not any(differences(a, left(model, inputs)) for a, inputs in zip(expected, prompts, strict=True))
    assert replays(engine) == [3]


def test_a_shape_is_recorded_when_it_comes_again():
    model, inputs = patched(), batch(LLAMA, (1,))
    expected, engine = left(model, inputs), record(model, after=3)
    made = [not differences(expected, left(model, inputs)) and len(engine.recorded) for _ in range(4)]
    assert made == [0, 0, 1, 1]
    assert replays(engine) == [2]


@pytest.mark.parametrize("change", ["weights", "values", "hook", "adapter", "config"])
def test_a_model_that_has_changed_is_recorded_anew(change):
    model, inputs = patched(), batch(LLAMA, (1,))
    engine, text = record(model), model.model.language_model
    before = left(model, inputs)["logits"]
    layer = text.layers[1].mlp
    if change == "weights":
        layer.down_proj.weight = torch.nn.Parameter(-layer.down_proj.weight.detach())
    elif change == "values":  # they lie where they lay: the recording reads them
        with torch.no_grad():
            layer.down_proj.weight.neg_()
    elif change == "hook":
        layer.register_forward_hook(lambda _module, _args, out: -out)
    elif change == "adapter":
        layer.down_proj = Negated(layer.down_proj)
        left(model, inputs)
        layer.down_proj.sign = 1.0
    else:
        text.config.rms_norm_eps, text.config.note = text.config.rms_norm_eps, "new"
    got, number = left(model, inputs), len(replays(engine))
    mustdrop.compile(model, graphs=0)
    assert not differences(left(model, inputs), got)
    same = change in ("config", "adapter")
    assert torch.equal(before, got["logits"]) == same
    assert number == {"values": 1, "adapter": 3}.get(change, 2)


class Negated(torch.nn.Module):
    """A layer of somebody's own, with a switch."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.sign = inner, -1.0

    def forward(self, x):
        return self.sign * self.inner(x)


def test_settings_of_torch_are_part_of_the_shape():
    model, inputs = patched(), batch(LLAMA, (1,))
    engine = record(model)
    left(model, inputs)
    model.set_attn_implementation({"text_config": "eager"})
    expected = left(model, inputs)
    assert len(replays(engine)) == 2
    mustdrop.compile(model, graphs=0)
    assert not differences(left(model, inputs), expected)


class Broken(Recorder):
    """Fails while the pass is recorded."""

    def capture(self, run, inputs):
        run(inputs)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def test_a_capture_that_fails_leaves_the_model_as_it_was():
    model, inputs = patched(), batch(LLAMA, (1, 2))
    expected, engine = left(model, inputs), record(model)
    engine.capturer = Broken()
    with pytest.warns(CaptureWarning, match="RuntimeError: operation not permitted when stream is capturing"):
        assert not differences(expected, left(model, inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)  # it is said once
        assert not differences(expected, left(model, inputs))
    assert _runtime(model).local.straight is None


def test_a_pass_that_fails_in_a_layer_leaves_the_model_and_the_cache_as_they_were():
    model, inputs = patched(), batch(LLAMA, (1,))
    expected, engine = left(model, inputs), record(model, after=2)

    def fails(*_):
        raise ValueError("no")

    def call():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", CaptureWarning)
            model(**inputs, past_key_values=cache)

    handle = model.model.language_model.layers[3].register_forward_pre_hook(fails)
    cache = DynamicCache(config=model.config.get_text_config())
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            call()
        assert cache.get_seq_length() == 0
    handle.remove()
    engine.refused.clear()
    assert not differences(expected, left(model, inputs))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"method": "snapkv", "keep": 9}, "the cache is cut by what each layer has read"),
        ({"prefill": PrefillPruner(global_threshold=0.02, individual_threshold=0.02)}, "how many tokens stay"),
    ],
    ids=["snapkv", "thresholds"],
)
def test_what_cannot_be_captured_says_why_once(settings, why):
    model, inputs = mustdrop.patch(clone(LLAMA), **settings), batch(LLAMA, (1,))
    expected, engine = left(model, inputs), record(model)
    with pytest.warns(CaptureWarning, match=why):
        assert not differences(expected, left(model, inputs))
    assert not engine.recorded


def test_gradients_and_training_run_as_they_are():
    model, inputs = patched(), batch(LLAMA, (1,))
    engine = record(model)
    with pytest.warns(CaptureWarning, match="gradients are wanted"):
        model(**inputs).logits.sum().backward()
    model.train()
    with pytest.warns(CaptureWarning, match="training mode"), torch.no_grad():
        model(**inputs)
    assert not engine.recorded


def test_a_text_alone_and_a_second_turn():
    model, inputs = patched(), batch(LLAMA, (1,))
    engine = record(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        answer(model, batch(LLAMA, (0,)), 2)
        first = answer(model, inputs, 2)
    assert len(engine.recorded) == 1
    mustdrop.compile(model, graphs=0)
    assert torch.equal(answer(model, inputs, 2).sequences, first.sequences)


def test_labels_and_no_cache():
    model, inputs = patched(), batch(LLAMA, (1, 2))
    given = {**inputs, "labels": inputs["input_ids"], "use_cache": False}
    with torch.no_grad():
        expected = model(**given)
        record(model)
        got = [model(**given) for _ in range(2)]
    assert all(torch.equal(one.loss, expected.loss) and one.past_key_values is None for one in got)


def test_inference_mode_after_no_grad():
    model, inputs = patched(), batch(LLAMA, (1,))
    expected = left(model, inputs)["logits"]
    record(model)
    left(model, inputs)
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(left(model, inputs)["logits"], expected)


def test_unpatching_releases_and_a_block_gives_back():
    model, inputs = patched(), batch(LLAMA, (1,))
    engine = record(model)
    left(model, inputs)
    with mustdrop.patched(model, "random", keep=9):
        assert _runtime(model).engine is None
    assert not engine.recorded
    assert engine.capturer.made == []
    again = _runtime(model).engine
    assert (again.graphs, again.after) == (8, 1)
    left(model, inputs)
    assert len(again.recorded) == 1
    assert _runtime(copy.deepcopy(model)).engine is None
    mustdrop.unpatch(model)
    assert not again.recorded


def test_what_the_user_gets_wrong():
    with pytest.raises(NotPatchedError, match="not patched"):
        mustdrop.compile(clone(LLAMA))
    model = patched()
    with pytest.raises(UnsupportedOptionError, match=r"is on 'cpu'.*backend=\"inductor\""):
        mustdrop.compile(model)
    for bad in ({"graphs": -1}, {"graphs": 2.0}, {"after": 0}, {"after": True}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            mustdrop.compile(model, backend="eager", **bad)
    assert _runtime(model).engine is None


def test_backends_of_torch_compile():
    model = mustdrop.patch(clone(QWEN2), "mustdrop", keep=0.4)
    prompts = [batch(QWEN2, (1,), seed=1), batch(QWEN2, (1,), seed=2), batch(QWEN2, (1, 1))]
    expected = [left(model, inputs) for inputs in prompts]
    assert mustdrop.compile(model, backend="eager", graphs=1, after=1) is model
    torch.compiler.reset()
    with pytest.warns(CaptureWarning, match="as many shapes are compiled as graphs=1 allows"):
        assert not any(differences(a, left(model, inputs)) for a, inputs in zip(expected, prompts, strict=True))
    assert len(_runtime(model).engine.known) == 1
    torch.compiler.reset()


def test_the_compiler_is_not_led_through_a_cache_of_python():
    """Dynamo warns of `functools.lru_cache` in what it traces, and traces what lies behind it."""
    model, inputs = patched(), batch(LLAMA, (1, 1))
    plainly = left(model, inputs)
    torch.compiler.reset()
    mustdrop.compile(model, backend="eager", after=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache.*")
        got = left(model, inputs)
    assert not differences(plainly, got)
    torch.compiler.reset()
