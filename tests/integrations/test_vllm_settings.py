"""The plugin for vLLM, as far as it goes without vLLM: its settings, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mustdrop
from mustdrop.errors import BudgetError, ConfigError, UnknownKnobError, UnknownMethodError, UnsupportedOptionError
from mustdrop.integrations.vllm import VARIABLE, settings, supported
from mustdrop.pruners import VisionStagePruner
from support import documented

SERVED = (
    "divprune",
    "dycoke",
    "fastervlm",
    "fastvid",
    "gleanvid",
    "hiprune",
    "holov",
    "mmr",
    "mustdrop",
    "pooling",
    "prumerge",
    "random",
    "scope",
    "tome",
    "uniform",
    "vcast",
    "vidcom2",
    "visionzip",
    "vispruner",
)


def test_the_entry_brings_nothing_heavy():
    code = (
        "import sys, mustdrop; before = set(sys.modules); import mustdrop.integrations.vllm; "
        "print(sorted(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() in ("['mustdrop.integrations', 'mustdrop.integrations.vllm']", "['mustdrop.integrations.vllm']")


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.32.0", True), ("0.32.3+cpu", True), ("0.31.9", False), ("0.33.0", False), ("0.32.0rc1", True), ("dev", False)],
)
def test_versions(version, expected):
    assert supported(version) is expected


@pytest.mark.parametrize("method", SERVED)
def test_methods_of_the_vision_stage_are_served(method):
    serving = settings.parse({"method": method, "keep": 64})
    assert isinstance(serving.pruner, VisionStagePruner)
    assert serving.count(576) == 64


@pytest.mark.parametrize("method", [name for name in mustdrop.methods() if name not in (*SERVED, "none")])
def test_all_others_are_refused_with_one_that_works(method):
    with pytest.raises(
        UnsupportedOptionError, match=rf"{method.replace('+', '.')} .*nearest method that works"
    ) as raised:
        settings.parse({"method": method})
    nearest = str(raised.value).rsplit('"', 2)[1]
    assert nearest in SERVED


def test_a_method_that_drops_nothing_is_left_out():
    with pytest.raises(UnsupportedOptionError, match=f'none drops nothing.*unset {VARIABLE}.*"mustdrop"'):
        settings.parse({"method": "none"})


@pytest.mark.parametrize("method", [name for name in mustdrop.methods() if name != "none"])
def test_the_page_says_which_methods_are_served(method):
    text = Path(documented.ROOT, "docs/serving.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and f"`{method}`" in line.split("|")[2]]
    assert len(rows) == 1
    assert rows[0].startswith("| refused") == (method not in SERVED)


def test_a_setting_that_reads_hidden_states_is_refused():
    with pytest.raises(UnsupportedOptionError, match="scope cannot prune in a server: it reads hidden states"):
        settings.parse({"method": "scope", "geometry": "standardized"})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"method": "divprun"}, UnknownMethodError),
        ({"method": "divprune", "kep": 3}, UnknownKnobError),
        ({"method": "divprune", "keep": 0}, BudgetError),
        ({"method": "divprune", "keep": 1.5}, BudgetError),
        ({"method": "divprune", "keep": "many"}, BudgetError),
        ({"method": "divprune", "keep": True}, BudgetError),
        ({"method": "visionzip", "contextual": 2}, ConfigError),
    ],
)
def test_wrong_settings_raise_what_patch_raises(given, error):
    knobs = {name: value for name, value in given.items() if name != "method"}
    with pytest.raises(error) as patched:
        mustdrop.method.find(given["method"], **knobs)
    with pytest.raises(error) as served:
        settings.parse(given)
    assert str(served.value) == str(patched.value)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"method": "mustdrop", "decode_keep": 8}, "decode_keep cannot be set"),
        ({"method": "mustdrop", "inside": True}, "alone, after the encoder, so that inside cannot be set"),
        ({"method": "tome", "r": 4}, "give keep="),
        ({"method": "prumerge", "adaptive": True}, "give keep="),
        ({"method": "tome", "r": 4, "compat": "released"}, "numbers positions anew"),
    ],
)
def test_knobs_that_cannot_work_are_named(given, text):
    with pytest.raises(UnsupportedOptionError, match=text):
        settings.parse(given)


def test_mustdrop_spends_its_budget_in_the_vision_stage():
    knobs = {"keep": 64, "window": 2, "merge_share": 0.25, "geometry": "centered"}
    pruner = settings.parse({"method": "mustdrop", **knobs}).pruner
    assert {name: getattr(pruner, name) for name in knobs} == knobs
    assert not pruner.inside  # the encoder is vLLM's, and runs whole
    assert settings.parse({}).count(576) == 192


@pytest.mark.parametrize(
    ("keep", "total", "expected"), [(64, 576, 64), (64, 36, 36), (0.25, 36, 9), (1.0, 7, 7), (0.01, 36, 1), (1, 1, 1)]
)
def test_counts(keep, total, expected):
    assert settings.parse({"method": "uniform", "keep": keep}).count(total) == expected


def test_keys_of_caches_tell_all_settings_apart():
    given = [
        {"method": "divprune", "keep": 64},
        {"method": "divprune", "keep": 65},
        {"method": "visionzip", "keep": 64},
        {"method": "visionzip", "keep": 64, "contextual": 0.2},
    ]
    keys = [settings.parse(one).key("picture", keep) for one in given for keep in (None, 32, 0.5)]
    assert len(set(keys)) == len(keys)
    assert settings.parse(given[0]).key("picture", None) == settings.parse(dict(given[0])).key("picture", None)
    assert settings.parse(given[0]).key("picture", None) != settings.parse(given[0]).key("other", None)


def test_keys_of_caches_tell_versions_apart(monkeypatch):
    before = settings.parse({"keep": 64}).key("picture", None)
    monkeypatch.setattr(settings, "__version__", "999")
    assert settings.parse({"keep": 64}).key("picture", None) != before


@pytest.mark.parametrize("text", ["{", "[]", '"divprune"', "divprune"])
def test_the_variable_must_be_an_object(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ConfigError, match="must be a JSON object"):
        settings.environment()


@pytest.mark.parametrize("keep", [0, -3, 1.5, "all", None, True])
def test_a_request_with_a_nonsense_keep_is_refused(keep):
    with pytest.raises(BudgetError, match="mustdrop_keep"):
        settings.asked(keep)
