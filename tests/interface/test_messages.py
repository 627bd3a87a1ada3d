"""What a user is told: which object to pass, which budget can be met, how to write a setting, and on which line."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
import transformers

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner, errors
from mustdrop.adapters import find, registry
from mustdrop.budget import keep_text, knob_text, parse_keep
from mustdrop.cli.common import budget
from mustdrop.demo.model import load
from mustdrop.runtime.plan import plan_row
from support import families
from support.builders import answer, batch, clone, plain
from support.families import plain as plain_family
from support.masking_check import distance

# ------------------------------------------------------------------------------------------------- what wraps a model


class Engine(torch.nn.Module):
    """As DeepSpeed's engine and DistributedDataParallel hold a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Flat(torch.nn.Module):
    """As FullyShardedDataParallel holds one: by a property."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    @property
    def module(self):
        return self._fsdp_wrapped_module


class Pipeline:
    """As transformers' pipelines hold one."""

    def __init__(self, model):
        self.model = model


WRAPPERS = {
    "compile": (torch.compile, r"\._orig_mod of what you passed"),
    "data_parallel": (torch.nn.DataParallel, r"\.module of what you passed"),
    "engine": (Engine, r"\.module of what you passed"),
    "fsdp": (Flat, r"\.module of what you passed"),
    "pipeline": (Pipeline, r"\.model of what you passed"),
    "engine_of_compiled": (lambda m: Engine(torch.compile(m)), r"\.module\._orig_mod of what you passed"),
    "pipeline_of_engine": (lambda m: Pipeline(Engine(m)), r"\.model\.module of what you passed"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_found_and_the_message_names_where(name):
    wrap, says = WRAPPERS[name]
    with pytest.raises(errors.UnsupportedModelError, match=f"It wraps a LlavaForCond.*{says}") as told:
        mustdrop.patch(wrap(plain()))
    assert len(str(told.value)) < 400


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_was_patched_before_it_was_wrapped_is_seen_through_the_wrapper(name):
    model = mustdrop.patch(clone(), "random", keep=9)
    answer(model, batch(), steps=1)
    wrapped = WRAPPERS[name][0](model)
    assert mustdrop.last_trace(wrapped).tokens[0, 0] == 9
    mustdrop.unpatch(wrapped)
    assert "_mustdrop" not in vars(model)
    assert mustdrop.last_trace(wrapped).tokens[0, 0] == 9  # what it tells stays


@pytest.mark.parametrize("family", registry())
def test_a_base_model_names_the_class_that_holds_it(family):
    adapter = registry()[family]
    if not adapter.available():
        pytest.skip(f"this transformers has no {family}")
    model = type(adapter.classes[0], (torch.nn.Module,), {})
    base = type(adapter.classes[0].partition("For")[0] + "Model", (torch.nn.Module,), {})
    with pytest.raises(errors.UnsupportedModelError, match=f"has no head: pass the {model.__name__} that holds it"):
        mustdrop.patch(base())


def test_a_real_base_model():
    with pytest.raises(errors.UnsupportedModelError, match="LlavaModel has no head: pass the LlavaForCond"):
        mustdrop.patch(plain().model)


@pytest.mark.parametrize(
    ("thing", "says"),
    [
        ("llava-hf/llava-1.5-7b-hf", r"AutoModelForImageTextToText\.from_pretrained\('llava-hf/llava-1\.5-7b-hf'\)"),
        (None, "Pass the model itself, not its processor"),
        (transformers.LlavaConfig(), "a LlavaForConditionalGeneration or the like"),
        (type("Qwen2VLProcessor", (), {})(), "Pass the model itself.* a Qwen2VLForConditionalGeneration or"),
        (torch.nn.Linear(2, 2), "such as LlavaForConditionalGeneration"),
    ],
    ids=["str", "none", "config", "processor", "layer"],
)
def test_what_is_no_model_is_told_what_to_pass(thing, says):
    with pytest.raises(errors.UnsupportedModelError, match=says) as told:
        mustdrop.patch(thing)
    assert type(thing).__name__ in str(told.value)


def test_at_most_three_classes_are_named():
    for name in (
        "LlavaNextForConditionalGenerations",
        "InternVLForCausalLM",
        "Qwen9VLForConditionalGeneration",
        "Nothing",
    ):
        with pytest.raises(errors.UnsupportedModelError) as told:
            mustdrop.patch(type(name, (torch.nn.Module,), {})())
        known = [c for a in registry().values() for c in a.classes if repr(c) in str(told.value)]
        assert len(known) <= 3
        assert len(str(told.value)) < 500
        assert bool(known) == (name != "Nothing")


# ------------------------------------------------------------------------------------------------------------ pickling


@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
@pytest.mark.parametrize("part", ["", "model", "model.language_model", "model.vision_tower"])
@pytest.mark.parametrize("how", ["pickle", "save"])
def test_a_patched_model_says_that_it_must_be_unpatched_first(how, part, called, tmp_path):
    model = type(plain())(plain().config).eval()  # a copy would have what transformers put into a model that has run
    twin = copy.deepcopy(model)
    mustdrop.patch(model)
    if called:
        answer(model, batch(), steps=1)
    thing = model.get_submodule(part)
    with pytest.raises(errors.PatchedModelError, match=r"mustdrop\.unpatch\(model\) first.*save_pretrained"):
        pickle.dumps(thing) if how == "pickle" else torch.save(thing, tmp_path / "model.pt")
    mustdrop.unpatch(model)
    if not called:  # after a call transformers' own hooks stop it
        assert torch.equal(answer(pickle.loads(pickle.dumps(model)), batch()).logits, answer(twin, batch()).logits)


def test_copies_and_weights_need_no_unpatching(tmp_path):
    model = mustdrop.patch(clone(), keep=0.4)
    expected = answer(model, batch(), steps=3)
    twin = copy.deepcopy(model)
    assert torch.equal(answer(twin, batch(), steps=3).logits, expected.logits)
    mustdrop.unpatch(model)
    assert torch.equal(answer(twin, batch(), steps=3).logits, expected.logits)
    twin.save_pretrained(tmp_path)
    torch.save(twin.state_dict(), tmp_path / "weights.pt")
    model.load_state_dict(torch.load(tmp_path / "weights.pt"))
    again = mustdrop.patch(type(model).from_pretrained(tmp_path).eval(), keep=0.4)
    assert distance(answer(again, batch(), steps=3).logits, expected.logits) <= 1e-5


# ------------------------------------------------------------------------------------------------- impossible budgets


@pytest.mark.parametrize(
    "family", [name for name, adapter in families.AVAILABLE.items() if "prefill" not in adapter.lacks]
)
def test_a_share_that_no_prompt_can_meet_is_refused_when_patching(family):
    model = plain_family(family)
    depth = len(find(model).decoder_layers(model))
    layer = depth - 2
    limit = (layer + 1) / depth
    with pytest.raises(errors.BudgetError, match=r"^keep=\S+ is impossible on this model") as told:
        mustdrop.patch(model, "fastv", keep=limit * 0.9, layer=layer + 1)
    assert "Or name a method that also drops earlier: 'mustdrop'." in str(told.value)
    assert not hasattr(model, "_mustdrop")
    smallest = float(str(told.value).split("keep=")[2].split()[0])
    enough = int(str(told.value).split(" vision tokens and more")[0].split()[-1])
    assert limit < smallest
    with mustdrop.patched(model, "fastv", keep=smallest, layer=layer + 1):
        runtime = model._mustdrop
    plan_row(runtime.method, enough, depth, runtime.filters)
    plan_row(runtime.method, 7 * enough, depth, runtime.filters)
    with pytest.raises(errors.BudgetError):
        plan_row(replace(runtime.method, strict=True), enough - 1, depth, runtime.filters)


@pytest.mark.parametrize(
    ("setup", "possible"),
    [
        ({"prefill": PrefillPruner(keep=1 / 3, layers=(1,))}, False),  # only at a budget for an endless prompt
        ({"prefill": PrefillPruner(keep=0.34, layers=(1,))}, True),
        ({"prefill": PrefillPruner(keep=1, layers=(4,))}, True),  # one vision token, and all is kept
        ({"prefill": PrefillPruner(keep=0.1, layers=(1,)), "vision": VisionStagePruner()}, True),
        ({"prefill": PrefillPruner(keep=0.1, layers=(1,)), "vision": VisionStagePruner(keep=0.25)}, True),
        ({"prefill": PrefillPruner(keep=0.1, layers=(1,)), "vision": VisionStagePruner(keep=0.5)}, False),
        ({"prefill": PrefillPruner(keep=0.1, layers=(1,)), "vision": VisionStagePruner(keep=5)}, True),
        ({"prefill": PrefillPruner(global_threshold=0.1, individual_threshold=0.1)}, True),
        ({"decode": DecodeCachePruner(keep=0.01)}, True),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::mustdrop.errors.AmbiguousBudgetWarning")
def test_only_what_can_never_be_met_is_refused(setup, possible):
    model = clone()
    if possible:
        mustdrop.patch(model, **setup)
    else:
        with pytest.raises(errors.BudgetError, match="impossible on this model"):
            mustdrop.patch(model, **setup)


def test_a_method_that_cannot_meet_its_own_default_says_so_at_once():
    model, _ = load()
    with pytest.raises(errors.BudgetError, match=r"first filter of 'pyramiddrop'.*keep=0\.\d+ works for prompts of"):
        mustdrop.patch(model, "pyramiddrop")
    before = mustdrop.patch(clone(), "random", keep=9)
    with pytest.raises(errors.BudgetError):
        mustdrop.patch(before, "fastv", keep=0.1)
    answer(before, batch(), steps=1)
    assert mustdrop.last_trace(before).tokens[0, 0] == 9  # the former method is still there


# ------------------------------------------------------------------------------------------------------ 1, 1.0 and 100%


def told_by(action, category=errors.AmbiguousBudgetWarning):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        action()
    return [warning for warning in seen if issubclass(warning.category, category)]


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 1},
        {"method": "random", "keep": 1},
        {"method": "snapkv", "keep": 1},
        {"method": "mustdrop+", "keep": 1},
        {"decode": DecodeCachePruner(keep=1)},
        {"vision": VisionStagePruner(keep=1)},
    ],
    ids=str,
)
def test_one_token_is_told_from_all_of_them_once(settings):
    model = clone()
    (warning,) = told_by(lambda: mustdrop.patch(model, **settings))
    assert "keeps one token" in str(warning.message)
    assert "keep=1.0 (100%) keeps all" in str(warning.message)
    assert warning.filename == __file__
    assert not told_by(lambda: answer(model, batch(), steps=1))
    with mustdrop.patched(clone(), "none"):  # what is put back was told before
        assert not told_by(lambda: mustdrop.patch(model, "random", keep=2))


def test_the_budget_of_the_cache_is_told_by_its_own_name():
    (warning,) = told_by(lambda: mustdrop.patch(clone(), decode_keep=1))
    assert "decode_keep=1 keeps one token" in str(warning.message)


@pytest.mark.parametrize(("keep", "meant"), [("25%", "keep=0.25"), ("0.25", "keep=0.25"), ("64", "keep=64")])
def test_a_budget_in_quotes_is_told_what_to_write(keep, meant):
    for make in (lambda: mustdrop.patch(clone(), keep=keep), lambda: PrefillPruner(keep=keep)):
        with pytest.raises(errors.BudgetError, match=f"got '{keep}'. Without quotes: {meant}."):
            make()


class Unfinished(mustdrop.Recipe):
    """A recipe that builds nothing."""


@pytest.mark.parametrize("method", [mustdrop.Recipe, mustdrop.Recipe(), Unfinished, Unfinished()], ids=repr)
def test_a_recipe_without_build_is_refused(method):
    with pytest.raises(errors.ConfigError, match=r"has no build\(\)"):
        mustdrop.patch(clone(), method)


def test_what_is_no_method_is_named_in_one_line():
    with pytest.raises(errors.ConfigError, match=r"got a LlavaForConditionalGeneration\.$"):
        mustdrop.patch(clone(), clone())


def test_a_config_file_in_the_place_of_a_method_is_told_how_it_is_read(tmp_path):
    for given in (tmp_path / "chosen.json", str(tmp_path / "chosen.json")):
        with pytest.raises(ValueError, match=r"mustdrop.load_config\('.*chosen.json'\)"):
            mustdrop.patch(clone(), given)


@pytest.mark.parametrize("strict", ["no", 1, 0.0, []])
def test_strict_is_a_truth_value(strict):
    with pytest.raises(errors.ConfigError, match="strict must be True or False"):
        mustdrop.patch(clone(), strict=strict)


def test_a_module_that_holds_a_model_names_the_part():
    holder = torch.nn.Module()
    holder.part = torch.nn.ModuleDict({"eye": clone()})
    with pytest.raises(errors.UnsupportedModelError, match=r"holds a Llava\w+: pass that, \.part\.eye of what"):
        mustdrop.patch(holder)


def test_what_is_put_back_is_not_told_again():
    model = clone()
    assert told_by(lambda: mustdrop.patch(model, keep=1))

    def inner():
        with mustdrop.patched(model, "none"):
            pass

    assert not told_by(inner)
    assert model._mustdrop.method.prefill.keep == 1


@pytest.mark.parametrize("keep", [1.0, 2, 0.01])
def test_other_budgets_are_not_talked_about(keep):
    assert not told_by(lambda: mustdrop.patch(clone(), keep=keep))


def test_tune_tells_it_once_and_prints_shares_in_per_cent():
    def tuned():
        options = {"methods": ["random", "uniform"], "keeps": [1, 1.0, 1 / 3], "max_new_tokens": 2}
        found.append(mustdrop.tune(plain(), [batch()], kl=100.0, **options))

    found = []
    (warning,) = told_by(tuned)
    assert warning.filename == __file__
    text = str(found[0])
    for cell in (" keep=1 ", " keep=100% ", " keep=33.33% "):
        assert cell in text
    assert "--keep 25% or keep=0.25" in text


@pytest.mark.parametrize(("keep", "text"), [(1, "1"), (1.0, "100%"), (64, "64"), (0.25, "25%"), (1 / 3, "33.33%")])
def test_a_budget_that_is_printed_can_be_typed(keep, text):
    assert keep_text(keep) == text
    assert type(parse_keep(text)) is type(keep)
    assert parse_keep(text) == pytest.approx(keep, abs=1e-4)
    assert budget(text) == parse_keep(text)
    assert knob_text("keep", keep) == f"keep={text}"


@pytest.mark.parametrize("text", ["", "%", "a", "1,5", "0x10", "5 %x", "ten%"])
def test_what_is_no_budget_is_not_read(text):
    with pytest.raises(errors.BudgetError, match="neither a number of tokens"):
        parse_keep(text)


# --------------------------------------------------------------------------------------------------- how to write it


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: PrefillPruner(64), r"takes its settings by name: write PrefillPruner\(keep=64\)"),
        (lambda: DecodeCachePruner(0.5), r"write DecodeCachePruner\(keep=0\.5\)"),
        (lambda: VisionStagePruner(3, 1), r"write VisionStagePruner\(keep=3\)"),
    ],
)
def test_settings_go_by_name(call, says):
    with pytest.raises(errors.ConfigError, match=says):
        call()


# ------------------------------------------------------------------------------------------------- the line of the user


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.generate(**batch(), max_new_tokens=1),
        lambda model: model(**batch()),
        lambda model: model.model(**batch()),
        lambda model: Engine(model).module(**batch()),
    ],
    ids=["generate", "forward", "base", "wrapped"],
)
def test_a_warning_points_at_the_line_that_called(call):
    model = mustdrop.patch(clone(), keep=1.0)
    (warning,) = told_by(lambda: call(model), errors.NothingDroppedWarning)
    assert warning.filename == __file__
    assert "keep=1.0 asks for all of them" in str(warning.message)


@pytest.mark.parametrize("name", ["AmbiguousBudgetWarning", "BrokenMethodWarning", "NothingDroppedWarning"])
def test_every_warning_has_a_category_of_its_own(name):
    assert issubclass(getattr(errors, name), UserWarning)
