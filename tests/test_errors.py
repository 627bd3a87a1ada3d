"""Bad input gets an error that says what was expected, what came and what to do. Never wrong numbers, never silence."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
import torch
import transformers

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner, errors
from support.builders import LLAMA, SIGLIP, anatomy, answer, batch, clone, plain
from support.masking_check import patched

THRESHOLDS = PrefillPruner(global_threshold=0.02, individual_threshold=0.02)

KINDS = {
    "UnsupportedModelError": TypeError,
    "UnknownMethodError": ValueError,
    "UnknownKnobError": ValueError,
    "BudgetError": ValueError,
    "ConfigError": ValueError,
    "UnsupportedOptionError": NotImplementedError,
    "NotPatchedError": RuntimeError,
    "CacheStateError": RuntimeError,
    "MissingPackageError": ImportError,
}


@pytest.mark.parametrize(("name", "builtin"), KINDS.items())
def test_every_error_is_a_mustdrop_error_and_a_builtin_one(name, builtin):
    assert issubclass(getattr(errors, name), errors.MustDropError)
    assert issubclass(getattr(errors, name), builtin)


def test_the_warning_is_a_user_warning():
    assert issubclass(errors.NothingDroppedWarning, UserWarning)


@contextmanager
def refused_and_untouched(model, error, match):
    """The block raises ``error``, and ``model`` carries nothing of mustdrop afterwards."""
    before = anatomy(model)
    with pytest.raises(error, match=match) as raised:
        yield raised
    assert anatomy(model) == before


# -------------------------------------------------------------------------------------------------------- unknown names


def test_an_unknown_method_lists_the_known_ones_and_the_nearest():
    with pytest.raises(errors.UnknownMethodError) as raised:
        mustdrop.patch(clone(), "mustdorp")
    message = str(raised.value)
    assert "'mustdorp'" in message
    assert "Did you mean 'mustdrop'?" in message
    assert all(name in message for name in mustdrop.methods())
    assert {"mustdrop", "none", "random"} <= set(mustdrop.methods())


@pytest.mark.parametrize(
    ("knob", "nearest"), [("keeep", "keep"), ("global_treshold", "global_threshold"), ("windows", "window")]
)
def test_an_unknown_knob_lists_the_known_ones_and_the_nearest(knob, nearest):
    model = clone()
    with refused_and_untouched(model, errors.UnknownKnobError, knob) as raised:
        mustdrop.patch(model, "mustdrop", **{knob: 0.5})
    message = str(raised.value)
    assert f"'{knob}'" in message
    assert f"Did you mean '{nearest}'?" in message
    assert "individual_threshold" in message


def test_a_knob_of_another_method_is_unknown():
    with pytest.raises(errors.UnknownKnobError, match="seed"):
        mustdrop.patch(clone(), "mustdrop", seed=3)
    with pytest.raises(errors.UnknownKnobError, match="window"):
        mustdrop.patch(clone(), "random", window=3)


@pytest.mark.parametrize(
    "thing",
    [torch.nn.Linear(2, 2), "llava-hf/llava-1.5-7b-hf", None, plain().config, plain().model],
    ids=["module", "name", "none", "config", "base_model"],
)
def test_an_unknown_model_lists_the_known_ones(thing):
    with pytest.raises(errors.UnsupportedModelError) as raised:
        mustdrop.patch(thing)
    assert type(thing).__name__ in str(raised.value)
    assert "LlavaForConditionalGeneration" in str(raised.value)
    assert "llava" in mustdrop.adapters()


def test_the_nearest_model_is_named():
    class LlavaForConditionalGenerations(torch.nn.Module):
        pass

    with pytest.raises(errors.UnsupportedModelError, match="Did you mean 'LlavaForConditionalGeneration'"):
        mustdrop.patch(LlavaForConditionalGenerations())


@pytest.mark.parametrize(
    ("kind", "says", "hint"),
    [
        ("Bert", "mustdrop has no adapter for BertModel. It reads no images, so it has no vision tokens", None),
        ("Llama", "no adapter for LlamaModel. It reads no images", "Llama4ForConditionalGeneration"),
        ("ViT", "no adapter for ViTModel. It encodes images, and holds no language model", None),
        ("CLIPVision", "no adapter for CLIPVisionModel. It encodes images", None),
        ("Linear", "no adapter for Linear. It is no model of transformers", None),
    ],
)
def test_what_is_no_vision_language_model_is_told_what_it_lacks_and_what_fits(kind, says, hint):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "Linear":
        thing = torch.nn.Linear(2, 2)
    else:
        thing = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**small))
    with pytest.raises(errors.UnsupportedModelError) as raised:
        mustdrop.patch(thing)
    said = str(raised.value)
    assert says in said
    assert "mustdrop.list_adapters()" in said
    assert ("Did you mean" in said) is (hint is not None)
    assert hint is None or hint in said


def test_a_subclass_of_a_known_model_is_known():
    class Mine(transformers.LlavaForConditionalGeneration):
        pass

    model = clone()
    model.__class__ = Mine
    answer(mustdrop.patch(model), batch(), steps=1)
    assert mustdrop.trace(model).tokens[-1, 0] < 36


# -------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("method", ["mustdrop", "random", "uniform"])
@pytest.mark.parametrize("keep", [0, -1, -0.5, 0.0, 1.0001, 37.5, float("nan"), float("inf"), True, "64"])
def test_a_budget_that_can_never_be_right_is_refused_when_patching(method, keep):
    model = clone()
    with refused_and_untouched(model, errors.BudgetError, "keep"):
        mustdrop.patch(model, method, keep=keep)


@pytest.mark.parametrize("method", ["mustdrop", "random", "uniform"])
def test_a_budget_above_the_images_tokens_is_refused_before_any_work(method):
    model = mustdrop.patch(clone(), method, keep=37, strict=True)
    assert_refused(model, batch(), errors.BudgetError, "37.*36|36.*37")
    answer(model, batch(LLAMA, (2,)), steps=1)  # two images have 72
    assert mustdrop.trace(model).equal_tokens[0] <= 37


def test_a_text_only_row_needs_no_budget():
    model = mustdrop.patch(clone(), "mustdrop", keep=20)
    answer(model, batch(LLAMA, (1, 0)), steps=1)
    assert mustdrop.trace(model).equal_tokens[1] == 0


def test_an_impossible_budget_names_the_smallest_possible_one():
    """Without a vision stage the layers before the first filter process everything."""
    model = patched(prefill=PrefillPruner(keep=5, layers=(1, 3)))
    with pytest.raises(errors.BudgetError, match=r"smallest possible keep is (\d+)") as raised:
        answer(model, batch())
    least = int(str(raised.value).split("smallest possible keep is ")[1].split()[0])
    assert least == -(-(2 * 36 + 4) // 6)
    mustdrop.patch(model, prefill=PrefillPruner(keep=least, layers=(1, 3)))
    answer(model, batch(), steps=1)
    assert mustdrop.trace(model).equal_tokens[0] <= least
    assert_refused(
        mustdrop.patch(model, prefill=PrefillPruner(keep=least - 1, layers=(1, 3))),
        batch(),
        errors.BudgetError,
        "smallest",
    )


def test_a_decode_budget_above_the_images_tokens_is_refused():
    assert_refused(patched(decode=DecodeCachePruner(keep=37), strict=True), batch(), errors.BudgetError, "36")


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"global_threshold": 0.1}, "individual_threshold"),
        ({"individual_threshold": 0.1}, "global_threshold"),
        ({"global_threshold": 1.1, "individual_threshold": 0.1}, "global_threshold"),
        ({"global_threshold": 0.1, "individual_threshold": -0.1}, "individual_threshold"),
        ({"scale": 1.0, "keep": 0.5}, "scale"),
        ({"scale": -1.0, "bias": 0.0}, "scale"),
        ({"threshold": 2.0}, "threshold"),
        ({"window": 1}, "window"),
        ({"key_share": 1.5}, "key_share"),
        ({"interval": 0}, "interval"),
        ({"compat": "release"}, "compat"),
        ({"keep": 0.5, "layers": (0, 6)}, "layers"),
        ({"keep": 0.5, "layers": (3, 1)}, "ascending"),
        ({"keep": 0.5, "layers": (-1,)}, "layers"),
        ({"keep": 0.5, "layers": (5,)}, "layers"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_when_patching(settings, names):
    model = clone()
    with refused_and_untouched(model, errors.ConfigError, names):
        mustdrop.patch(model, "mustdrop", **settings)


@pytest.mark.parametrize(
    ("pruner", "names"),
    [
        ({"prefill": PrefillPruner(keep=0.5, layers=(2, 9))}, "9.*6 decoder layers"),
        ({"vision": VisionStagePruner(layer=3)}, "layer"),
        ({"vision": VisionStagePruner(layer=2)}, "layer"),
        ({"vision": VisionStagePruner(layer=9)}, "layer"),
        ({"vision": VisionStagePruner(key_layer=4)}, "key_layer"),
        ({"vision": VisionStagePruner(key_layer=-5)}, "key_layer"),
        ({"vision": VisionStagePruner(window=7)}, "window"),
    ],
    ids=str,
)
def test_layers_outside_the_model_are_refused(pruner, names):
    """When patching, or at the latest before the tower runs."""
    model = clone()
    before = anatomy(model)
    try:
        mustdrop.patch(model, **pruner, strict=True)
    except errors.ConfigError as error:
        assert re.search(names, str(error))  # noqa: PT017
        assert anatomy(model) == before
    else:
        assert_refused(model, batch(), errors.ConfigError, names)


def test_a_method_and_pruners_together_contradict():
    with pytest.raises(errors.ConfigError, match="method"):
        mustdrop.patch(clone(), "mustdrop", prefill=THRESHOLDS)
    with pytest.raises(errors.ConfigError, match="keep"):
        mustdrop.patch(clone(), keep=0.5, prefill=THRESHOLDS)


def test_pruners_in_the_wrong_socket_are_refused():
    with pytest.raises(errors.ConfigError, match="PrefillPruner"):
        mustdrop.patch(clone(), prefill=DecodeCachePruner())
    with pytest.raises(errors.ConfigError, match="released"):
        mustdrop.patch(
            clone(),
            vision=VisionStagePruner(compat="released"),
            prefill=PrefillPruner(global_threshold=0.1, individual_threshold=0.1),
        )


# ---------------------------------------------------------------------------------------- caches, backends and options


def assert_refused(model, inputs, error, match, call=None, **options):
    """Raises before the tower or a decoder layer ran; afterwards the model works."""
    work = []
    modules = [model.model.vision_tower, *model.model.language_model.layers]
    handles = [module.register_forward_hook(lambda *_: work.append(1)) for module in modules]
    with pytest.raises(error, match=f"(?is){match}"):
        (call or (lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)))()
    for handle in handles:
        handle.remove()
    assert not work, "work was done before the error"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"cache_implementation": "sliding_window"}, "sliding_window"),
        ({"cache_implementation": "offloaded"}, "offload"),
        ({"cache_implementation": "quantized"}, "quantized"),
        ({"cache_implementation": "offloaded_static"}, "static|offload"),
    ],
    ids=str,
)
def test_unsupported_caches_are_named_before_any_work(options, names):
    model, inputs = patched(prefill=THRESHOLDS), batch()
    assert_refused(model, inputs, errors.UnsupportedOptionError, names, **options)
    expected = answer(patched(prefill=THRESHOLDS), inputs)
    assert torch.equal(answer(model, inputs).logits, expected.logits)


@pytest.mark.parametrize("how", ["generate", "forward"])
def test_unsupported_cache_objects_are_named_before_any_work(how):
    model, inputs = patched(prefill=THRESHOLDS), batch()
    config = model.config.get_text_config()
    window = transformers.cache_utils.StaticSlidingWindowLayer(max_cache_len=64, sliding_window=16)
    sliding = transformers.cache_utils.Cache(layers=[window] * config.num_hidden_layers)
    given = {**inputs, "past_key_values": sliding}
    call = None if how == "generate" else (lambda: model(**given))
    assert_refused(model, given, errors.UnsupportedOptionError, "StaticSlidingWindowLayer", call=call)


def test_an_offloaded_cache_object_is_named_before_any_work():
    model = patched(prefill=THRESHOLDS)
    try:
        cache = transformers.DynamicCache(config=model.config.get_text_config(), offloading=True)
    except Exception as error:  # some releases need an accelerator to build one
        pytest.skip(f"cannot build an offloading cache here: {error}")
    assert_refused(model, {**batch(), "past_key_values": cache}, errors.UnsupportedOptionError, "offload")


def test_flex_attention_in_a_text_model_that_has_none_is_named_before_any_work():
    model = patched(prefill=THRESHOLDS)
    model.model.language_model._supports_flex_attn = False
    model.model.language_model.config._attn_implementation_internal = "flex_attention"
    assert_refused(model, batch(), errors.UnsupportedOptionError, "flex_attention.*LlamaModel")


def test_gradient_checkpointing_in_training_is_refused_and_in_eval_it_is_fine():
    model, inputs = patched(prefill=THRESHOLDS), batch()
    expected = answer(model, inputs, steps=2)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(errors.UnsupportedOptionError, match="gradient checkpointing"):
        model(**inputs, labels=inputs["input_ids"])
    model.eval()
    assert torch.equal(answer(model, inputs, steps=2).logits, expected.logits)


@pytest.mark.parametrize(
    "options",
    [{"prefill_chunk_size": 16}, {"cache_implementation": "paged"}, {"cache_implementation": "hybrid"}],
    ids=str,
)
def test_other_unsupported_options_are_named_before_any_work(options):
    assert_refused(patched(prefill=THRESHOLDS), batch(), errors.UnsupportedOptionError, next(iter(options)), **options)


@pytest.mark.parametrize(
    "options",
    [{"output_attentions": True}, {"output_hidden_states": True}, {"cache_implementation": "dynamic"}],
    ids=str,
)
def test_options_that_only_report_change_no_bit(options):
    model, inputs = patched(LLAMA, "eager", prefill=THRESHOLDS), batch(seed=3)
    expected = answer(model, inputs, steps=5)
    got = answer(model, inputs, steps=5, **options)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("assistant", ["model", "prompt_lookup"])
@pytest.mark.parametrize("decode", [None, DecodeCachePruner(keep=4, interval=1)], ids=["kept", "evicted"])
def test_assisted_decoding_gives_the_ordinary_answer_or_is_refused(assistant, decode):
    """Drafted words are not the question: they must not decide what is dropped."""
    inputs, setup = batch(seed=3, after=(8,)), {"prefill": PrefillPruner(keep=0.6), "decode": decode}
    inputs["input_ids"][:, -3:] = inputs["input_ids"][:, -8:-5]  # a repeated phrase, so that the lookup has a draft
    end = {"eos_token_id": 206}  # before 5.17 the prompt lookup needs one
    expected = answer(patched(**setup), inputs, steps=11, **end)
    assert not torch.equal(expected.sequences, answer(plain(), inputs, steps=11, **end).sequences)
    options = {"assistant_model": clone()} if assistant == "model" else {"prompt_lookup_num_tokens": 3}
    try:
        got = patched(**setup).generate(**inputs, max_new_tokens=12, do_sample=False, **end, **options)
    except errors.UnsupportedOptionError as error:
        assert next(iter(options)) in str(error)  # noqa: PT017
    else:
        assert torch.equal(got, expected.sequences)


def test_a_tower_without_cls_read_with_the_wrong_strategy_is_an_error():
    model, inputs = clone(SIGLIP), batch(SIGLIP)
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(errors.ConfigError, match="full"):
        answer(mustdrop.patch(model, vision=VisionStagePruner(window=None, keep=9)), inputs)
