"""`mustdrop doctor` where vLLM is installed: is the plugin found, for which models, and does it prune."""

from __future__ import annotations

from mustdrop.doctor import serving
from mustdrop.doctor.selftest import serves
from mustdrop.integrations.vllm import ARCHITECTURES, VARIABLE


def test_the_plugin_is_found(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv(VARIABLE, '{"keep": 9}')
    facts = serving.facts()
    assert facts["plugin"] == "found"
    assert facts["vllm"].endswith("tested")
    assert facts[VARIABLE] == '{"keep": 9}'
    assert facts["architectures"].split(", ") == list(ARCHITECTURES)


def test_a_plugin_that_is_left_out_is_seen(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    monkeypatch.delenv(VARIABLE, raising=False)
    facts = serving.facts()
    assert "left out by VLLM_PLUGINS=another" in facts["plugin"]
    assert "not set" in facts[VARIABLE]


def test_the_self_test_asks_a_served_model():
    assert serves(None).startswith("prompts of ")
