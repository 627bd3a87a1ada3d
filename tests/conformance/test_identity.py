"""Keeping everything changes no bit, and a model that was unpatched is what it was."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner
from mustdrop.errors import NotPatchedError
from support.builders import LLAMA, QWEN2, SIGLIP, VARIANTS, anatomy, answer, batch, clone, fresh, plain
from support.masking_check import distance, patched

pytestmark = pytest.mark.filterwarnings("ignore::mustdrop.errors.NothingDroppedWarning")

FLASH = "flash_attention_2"
STAGES = {
    "vision": VisionStagePruner(window=3),
    "prefill": PrefillPruner(keep=0.4),
    "decode": DecodeCachePruner(keep=6, interval=2),
}


def same(a, b):
    return torch.equal(a.logits, b.logits) and torch.equal(a.sequences, b.sequences)


# ------------------------------------------------------------------------------------------------------------ keep all

KEEP_ALL = {
    "share": {"method": "mustdrop", "keep": 1.0, "window": None},
    "merge_nothing": {"method": "mustdrop", "keep": 1.0, "threshold": 1.0},
    "default_windows": {"method": "mustdrop", "keep": 1.0},
    "prefill_share": {"prefill": PrefillPruner(keep=1.0)},
    "thresholds": {"prefill": PrefillPruner(global_threshold=1.0, individual_threshold=0.0)},
    "vision_share": {"vision": VisionStagePruner(window=None, keep=1.0)},
    "decode": {"decode": DecodeCachePruner(keep=1.0, interval=1)},
    "none": {"method": "none"},
    "random": {"method": "random", "keep": 1.0},
    "uniform": {"method": "uniform", "keep": 1.0},
}


@pytest.mark.parametrize("attn", ["eager", "sdpa", FLASH])
@pytest.mark.parametrize("setup", KEEP_ALL)
def test_keeping_everything_is_bit_identical(setup, attn, request):
    if attn == FLASH:
        request.getfixturevalue("flash")
    knobs, inputs = dict(KEEP_ALL[setup]), batch(LLAMA, (1, 0, 2), seed=1)
    model = patched(LLAMA, attn, knobs.pop("method", None), **knobs)
    ours, trace = answer(model, inputs), mustdrop.trace(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    mustdrop.unpatch(model)
    with torch.no_grad():
        assert torch.equal(logits, model(**inputs).logits)
    assert same(ours, answer(model, inputs))
    assert torch.equal(trace.equal_tokens, trace.total.float())


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_keeping_every_token_by_count_is_bit_identical(variant):
    inputs = batch(variant, (2, 2), seed=2)
    model = patched(variant, method="mustdrop", keep=2 * variant.n_vision)
    assert same(answer(model, inputs), answer(plain(variant), inputs))


def test_keeping_everything_is_bit_identical_under_beams_and_sampling():
    model, inputs = patched(method="mustdrop", keep=1.0), batch(LLAMA, (1, 1), seed=3)
    assert same(answer(model, inputs, num_beams=3), answer(plain(), inputs, num_beams=3))
    for each in (model, plain()):
        torch.manual_seed(0)
        drawn = answer(each, inputs, do_sample=True, num_return_sequences=2)
        if each is model:
            ours = drawn
    assert same(ours, drawn)


# ------------------------------------------------------------------------------------------------- patching, unpatching


@pytest.mark.parametrize("run", ["never_ran", "ran", "failed"])
@pytest.mark.parametrize("variant", [LLAMA, QWEN2, SIGLIP], ids=str)
def test_unpatch_restores_everything(variant, run):
    model, inputs = fresh(variant), batch(variant, (1, 2), seed=4)
    expected = answer(model, inputs)
    before = anatomy(model)
    assert mustdrop.patch(model, **STAGES) is model
    assert anatomy(model) != before
    if run == "ran":
        assert not torch.equal(answer(model, inputs).logits, expected.logits)
    if run == "failed":
        handle = model.model.language_model.layers[2].register_forward_hook(explode)
        with pytest.raises(ExplosionError):
            answer(model, inputs)
        handle.remove()
    assert mustdrop.unpatch(model) is model
    assert anatomy(model) == before
    assert same(answer(model, inputs), expected)


def test_patching_leaves_the_class_alone():
    before = {kind: dict(vars(kind)) for kind in {type(module) for module in plain().modules()}}
    model = patched(**STAGES)
    answer(model, batch(LLAMA), steps=2)
    for kind, attributes in before.items():
        assert dict(vars(kind)) == attributes


def test_patching_twice_replaces():
    inputs = batch(LLAMA, (1, 2), seed=5)
    expected = answer(patched(prefill=PrefillPruner(keep=0.5)), inputs)
    model = clone()
    answer(model, inputs, steps=0)  # transformers hooks its own recorders in at the first run
    before = anatomy(model)
    mustdrop.patch(model, **STAGES)
    answer(model, inputs, steps=3)
    mustdrop.patch(model, prefill=PrefillPruner(keep=0.5))
    assert same(answer(model, inputs), expected)
    mustdrop.unpatch(model)
    assert anatomy(model) == before


def test_a_patch_that_fails_leaves_the_patch_that_was_there():
    inputs, model = batch(LLAMA, seed=6), patched(prefill=PrefillPruner(keep=0.5))
    expected = answer(model, inputs)
    with pytest.raises(mustdrop.errors.ConfigError):
        mustdrop.patch(model, prefill=PrefillPruner(keep=0.5, layers=(40,)))
    assert same(answer(model, inputs), expected)


def test_the_context_manager_patches_for_its_block_only():
    inputs, model = batch(LLAMA, (1, 2), seed=7), clone()
    expected, before = answer(model, inputs), anatomy(model)
    with mustdrop.patched(model, "mustdrop", keep=0.4) as inside:
        assert inside is model
        assert not torch.equal(answer(model, inputs).logits, expected.logits)
    assert anatomy(model) == before
    with pytest.raises(ExplosionError), mustdrop.patched(model):
        raise ExplosionError
    assert anatomy(model) == before
    assert same(answer(model, inputs), expected)


def test_two_models_patched_differently_and_an_unpatched_third_never_meet():
    inputs = batch(LLAMA, (1, 2), seed=8)
    settings = [{"prefill": PrefillPruner(keep=0.5)}, STAGES]
    alone = [answer(patched(**each), inputs) for each in settings]
    third = clone()
    untouched, before = answer(third, inputs), anatomy(third)
    models = [patched(**each) for each in settings]
    for _ in range(2):
        assert same(answer(third, inputs), untouched)
        for model, expected in zip(models, alone, strict=True):
            assert same(answer(model, inputs), expected)
    traces = [mustdrop.trace(model) for model in models]
    assert not torch.equal(traces[0].tokens, traces[1].tokens)
    mustdrop.unpatch(models[0])
    assert same(answer(models[0], inputs), untouched)
    assert same(answer(models[1], inputs), alone[1])
    assert anatomy(third) == before


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after_a_run"])
def test_a_deepcopy_is_patched_and_independent(ran):
    inputs, model = batch(LLAMA, (1, 2), seed=9), patched(**STAGES)
    expected, untouched = answer(patched(**STAGES), inputs), answer(plain(), inputs)
    if ran:
        answer(model, inputs, steps=4)
    twin = copy.deepcopy(model)
    assert same(answer(twin, inputs), expected)
    assert same(answer(model, inputs), expected)
    with torch.no_grad():  # the twin reads its own weights
        twin.lm_head.weight.mul_(2)
    assert torch.equal(answer(twin, inputs, steps=0).logits, 2 * answer(model, inputs, steps=0).logits)
    with torch.no_grad():
        twin.lm_head.weight.div_(2)
    mustdrop.unpatch(model)
    assert same(answer(model, inputs), untouched)
    assert same(answer(twin, inputs), expected)
    mustdrop.unpatch(twin)
    assert same(answer(twin, inputs), untouched)
    assert [n for n, m in twin.named_modules() if any(v for k, v in vars(m).items() if k.endswith("hooks"))] == [
        n for n, m in plain().named_modules() if any(v for k, v in vars(m).items() if k.endswith("hooks"))
    ]


def test_save_pretrained_saves_the_plain_model(tmp_path):
    model, inputs = patched(**STAGES), batch(LLAMA, seed=10)
    answer(model, inputs, steps=3)
    model.save_pretrained(tmp_path / "patched")
    plain().save_pretrained(tmp_path / "plain")
    files = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {path.name for path in (tmp_path / "patched").iterdir()} == files
    for name in files:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "patched").eval()
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in plain().state_dict().items())
    assert distance(answer(loaded, inputs).logits, answer(plain(), inputs).logits) <= 1e-5
    assert not torch.equal(answer(model, inputs).logits, answer(plain(), inputs).logits)


def test_the_state_dict_of_a_patched_model_is_the_plain_one():
    ours, theirs = patched(**STAGES).state_dict(), plain().state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_patched_model_moves_to_another_dtype_and_back():
    inputs, model = batch(LLAMA, (1, 2), seed=11), patched(**STAGES)
    double = {**inputs, "pixel_values": inputs["pixel_values"].double()}
    expected = answer(model, inputs)
    got = answer(model.to(torch.float64), double)
    assert got.logits.shape == expected.logits.shape
    assert distance(got.logits.float(), expected.logits) < 1e-4
    assert same(answer(model.to(torch.float32), inputs), expected)


def test_unpatching_a_plain_model_does_nothing():
    model = clone()
    before = anatomy(model)
    assert mustdrop.unpatch(model) is model
    assert anatomy(model) == before
    with pytest.raises(NotPatchedError):
        mustdrop.trace(model)


def test_importing_changes_nothing_anywhere():
    code = """
import json, sys, warnings, torch, transformers
from transformers import LlavaForConditionalGeneration, LlavaConfig, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llava import modeling_llava
from transformers import cache_utils
import transformers.models.llama.modeling_llama, transformers.models.clip.modeling_clip
def look():
    owners = [torch.nn.Module, modeling_llava, cache_utils, LlavaForConditionalGeneration, DynamicCache,
              cache_utils.DynamicLayer, transformers.models.llama.modeling_llama,
              transformers.models.clip.modeling_clip,
              transformers.models.llama.modeling_llama.LlamaAttention]
    return [{k: id(v) for k, v in vars(o).items()} for o in owners] + [
        sorted(ALL_ATTENTION_FUNCTIONS.keys()), list(map(str, warnings.filters)), torch.get_num_threads(),
        str(torch.get_default_dtype()), torch.random.get_rng_state().tolist(), torch.is_grad_enabled(),
        transformers.logging.get_verbosity()]
before = look()
import mustdrop
mustdrop.methods(), mustdrop.adapters()
print(json.dumps([str(a) for a, b in zip(before, look()) if a != b]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.strip().splitlines()[-1]) == []


# ---------------------------------------------------------------------------------------------------------- exceptions


class ExplosionError(Exception):
    """Raised by a hook of a test."""


def explode(*_):
    raise ExplosionError


@pytest.mark.parametrize(
    "where",
    [
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model.layers.0",
        "model.language_model.layers.1.self_attn",
        "model.language_model.layers.2.mlp",
        "model.language_model.norm",
        "lm_head",
    ],
)
def test_an_exception_in_the_prefill_leaves_the_model_usable_and_unpatchable(where):
    model, inputs = patched(**STAGES), batch(LLAMA, (1, 2), seed=12)
    expected, untouched = answer(model, inputs), answer(plain(), inputs)
    for register in ("register_forward_pre_hook", "register_forward_hook"):
        handle = getattr(model.get_submodule(where), register)(explode)
        with pytest.raises(ExplosionError):
            answer(model, inputs)
        handle.remove()
        assert same(answer(model, inputs), expected)
    mustdrop.unpatch(model)
    assert same(answer(model, inputs), untouched)


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("where", ["model.language_model.layers.3", "model.language_model.layers.1.self_attn"])
def test_an_exception_while_decoding_leaves_the_model_usable_and_unpatchable(where, step):
    model, inputs = patched(**STAGES), batch(LLAMA, (1, 2), seed=13)
    expected, untouched = answer(model, inputs), answer(plain(), inputs)
    calls = iter(range(100))
    handle = model.get_submodule(where).register_forward_pre_hook(lambda *_: explode() if next(calls) == step else None)
    with pytest.raises(ExplosionError):
        answer(model, inputs)
    handle.remove()
    assert same(answer(model, inputs), expected)
    mustdrop.unpatch(model)
    assert same(answer(model, inputs), untouched)


def test_one_token_and_one_hundred_percent_are_told_apart_in_one_process():
    """`1 == 1.0` in Python, also inside frozen settings: what one model was asked must not decide for another."""
    inputs = batch(LLAMA, (1,))
    everything = patched(vision=VisionStagePruner(window=None, keep=1.0))
    single = patched(vision=VisionStagePruner(window=None, keep=1))
    for _ in range(2):
        answer(everything, inputs, steps=1)
        answer(single, inputs, steps=1)
        assert mustdrop.trace(everything).tokens[:, 0].tolist() == [LLAMA.n_vision] * LLAMA.n_layers
        assert mustdrop.trace(single).tokens[:, 0].tolist() == [1] * LLAMA.n_layers
