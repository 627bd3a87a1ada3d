"""Architectures that cannot be patched are refused with the reason, and never both refused and supported."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from packaging.version import Version

import mustdrop
from mustdrop import errors
from mustdrop.adapters import registry
from mustdrop.adapters.unsupported import UNSUPPORTED
from tests.families import build, fixture_of, inputs_of


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_refused_architecture_says_why_and_what_works(name):
    model = type(name, (torch.nn.Module,), {})()
    with pytest.raises(errors.UnsupportedModelError) as raised:
        mustdrop.patch(model)
    family, why = UNSUPPORTED[name]
    for part in (name, family, why, "LlavaForConditionalGeneration"):
        assert part in str(raised.value)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="families came later")
@pytest.mark.parametrize("name", registry())
def test_every_adapter_is_of_a_family_that_transformers_has(name):
    assert registry()[name].available()


def test_a_family_that_needs_newer_transformers_says_which(monkeypatch):
    monkeypatch.setattr(type(registry()["llava"]), "since", "999.0")
    with pytest.raises(errors.UnsupportedModelError, match=r"llava needs transformers >= 999\.0, found"):
        mustdrop.patch(type("LlavaForConditionalGeneration", (torch.nn.Module,), {})())


def test_a_subclass_of_a_refused_architecture_is_refused_for_the_same_reason():
    parent = type("MllamaForConditionalGeneration", (torch.nn.Module,), {})
    with pytest.raises(errors.UnsupportedModelError, match="cross-attention"):
        mustdrop.patch(type("Mine", (parent,), {})())


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_no_architecture_is_both_refused_and_supported(name):
    assert name not in {kind for adapter in registry().values() for kind in adapter.classes}


def test_refused_names_are_names_of_transformers():
    present = [name for name in UNSUPPORTED if hasattr(transformers, name)]
    assert len(present) > len(UNSUPPORTED) // 2  # a few are newer than the oldest transformers
    assert "MllamaForConditionalGeneration" in present


@pytest.mark.parametrize("name", [name for name, adapter in registry().items() if adapter.lacks])
def test_a_stage_that_a_family_lacks_is_refused_and_the_others_work(name):
    adapter = registry()[name]
    if not adapter.available():
        pytest.skip(f"this transformers has no {name}")
    model = build(adapter)
    pruners = {
        "vision": mustdrop.VisionStagePruner(window=None, keep=0.5),
        "prefill": mustdrop.PrefillPruner(keep=0.5),
        "decode": mustdrop.DecodeCachePruner(keep=4),
    }
    for stage, pruner in pruners.items():
        if stage not in adapter.lacks:
            mustdrop.unpatch(mustdrop.patch(model, **{stage: pruner}))
            continue
        with pytest.raises(errors.UnsupportedModelError) as raised:
            mustdrop.patch(model, **{stage: pruner})
        for part in (f"{name} family has no {stage} stage", adapter.lacks[stage], "nearest method"):
            assert part in str(raised.value)
        assert not hasattr(model, "_mustdrop")
        (nearest,) = re.findall(
            r"nearest method that works here is mustdrop\.patch\(model, '([^']+)'", str(raised.value)
        )
        mustdrop.unpatch(mustdrop.patch(model, nearest, keep=0.5))


def test_a_model_whose_layers_share_keys_is_refused_with_the_models_that_work():
    adapter = registry()["gemma4"]
    if not adapter.available():
        pytest.skip("this transformers has no Gemma 4")
    model = build(adapter)
    model.config.text_config.num_kv_shared_layers = 2
    with pytest.raises(errors.UnsupportedModelError, match="num_kv_shared_layers=0"):
        mustdrop.patch(model)


@pytest.mark.parametrize("how", ["generate", "forward"])
def test_a_llama_4_prompt_whose_queries_are_scaled_by_place_is_refused(how):
    adapter = registry()["llama4"]
    model = build(adapter)
    model.config.text_config.attn_temperature_tuning, model.config.text_config.floor_scale = True, 30
    mustdrop.patch(model, keep=0.5)
    picture = torch.randn(fixture_of(adapter).sizes("image")[0])
    inputs = inputs_of(adapter, model, "image", [picture])
    with pytest.raises(errors.UnsupportedOptionError, match="floor_scale=30"):
        model.generate(**inputs, max_new_tokens=1) if how == "generate" else model(**inputs)
    model.config.text_config.floor_scale = 8192
    assert model.generate(**inputs, max_new_tokens=1).shape[1] == inputs["input_ids"].shape[1] + 1
