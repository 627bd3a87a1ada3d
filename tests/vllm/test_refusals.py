"""What pruning does not support is refused by name, before a model loads."""

from __future__ import annotations

import os
import shlex

import pytest

from mustdrop.errors import ConfigError, UnsupportedOptionError
from mustdrop.integrations.vllm import VARIABLE
from mustdrop.integrations.vllm.settings import of as settings_of
from support import documented, engines
from support import tiny_checkpoints as tiny

ARCHITECTURE = "MustDropLlavaForConditionalGeneration"
EAGLE = {"model": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("llava")
    tiny.save("llava", found)
    return found


def configure(folder, settings, architecture=ARCHITECTURE, **options):
    """The configuration of an engine, as `vllm serve` builds it."""
    os.environ.update(engines.QUIET)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    overrides = {"architectures": [architecture], "mustdrop": settings}
    given = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True} | options
    return EngineArgs(str(folder), hf_overrides=overrides, **given).create_engine_config()


def test_the_configuration_says_that_positions_are_ours(folder):
    config = configure(folder, {"keep": 9}).model_config
    assert config.uses_mrope
    assert config.multimodal_config.is_multimodal_pruning_enabled()
    assert 1 - config.multimodal_config.video_pruning_rate == 1


def test_the_line_of_the_page_that_names_a_model_on_purpose(folder, monkeypatch):
    os.environ.update(engines.QUIET)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.delenv(VARIABLE, raising=False)
    load_general_plugins()
    (line,) = documented.examples("docs/serving.md", "--hf-overrides", "architectures", kind="console")
    _, _, _, *given = shlex.split(line.replace("\\\n", " "))  # vllm serve MODEL
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options = ["--model", str(folder), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    config = EngineArgs.from_cli_args(parser.parse_args([*options, *given])).create_engine_config().model_config
    assert config.architectures == [ARCHITECTURE]
    assert settings_of(config.hf_config).count(576) == 128


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline-parallel-size"),
        ({"speculative_config": EAGLE}, "speculative"),
        ({"enable_mm_embeds": True}, "enable-mm-embeds"),
        ({"video_pruning_rate": 0.5}, "video-pruning-rate"),
        ({"mm_processor_kwargs": {"mustdrop_keep": 9}}, "mustdrop_keep"),
        ({"enable_lora": True, "enable_tower_connector_lora": True}, "tower"),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder"),
        ({"compilation_config": {"compile_mm_encoder": True}}, "compile_mm_encoder"),
    ],
)
def test_options(folder, options, name):
    with pytest.raises((UnsupportedOptionError, ValueError), match=name):
        configure(folder, {"method": "fastervlm", "keep": 9}, **options)


def test_encoders_that_each_see_some_of_the_images(tmp_path):
    """No process has the attention of all; features are handed over. LLaVA has no such encoders in vLLM."""
    tiny.save("qwen2_5_vl", tmp_path)
    options = {"architecture": "MustDropQwen2_5_VLForConditionalGeneration", "mm_encoder_tp_mode": "data"}
    options |= {"tensor_parallel_size": 2}
    with pytest.raises((UnsupportedOptionError, ValueError), match="mm-encoder-tp-mode data"):
        configure(tmp_path, {"method": "hiprune", "keep": 9}, **options)
    found = configure(tmp_path, {"method": "divprune", "keep": 9}, **options)
    assert found.model_config.multimodal_config.mm_encoder_tp_mode == "data"


def test_settings_that_are_wrong(folder):
    with pytest.raises((UnsupportedOptionError, ValueError), match="drops tokens between decoder layers"):
        configure(folder, {"method": "fastv", "keep": 9})
    with pytest.raises((ConfigError, ValueError), match="keep=-1 must be positive"):
        configure(folder, {"method": "divprune", "keep": -1})


def test_a_model_that_is_not_served_yet(folder):
    with pytest.raises(NotImplementedError, match="remote code"):
        configure(folder, {"keep": 9}, architecture="MustDropInternVLChatModel")


def test_a_server_that_is_asked_to_prune_does_not_start_without(monkeypatch):
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from mustdrop.integrations import vllm as plugin

    before = dict(MODELS_CONFIG_MAP)
    monkeypatch.setenv(plugin.VARIABLE, '{"keep": 9}')
    try:
        plugin.register()
        with pytest.raises(NotImplementedError, match="does not prune MiniCPMV in vLLM yet: served are"):
            MODELS_CONFIG_MAP["MiniCPMV"].verify_and_update_model_config(None)
    finally:
        MODELS_CONFIG_MAP.clear()
        MODELS_CONFIG_MAP.update(before)


def test_another_version_of_vllm(monkeypatch, caplog):
    import vllm

    from mustdrop.integrations import vllm as plugin

    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    monkeypatch.setenv(plugin.VARIABLE, '{"keep": 9}')
    with pytest.raises(ImportError, match=r"for vLLM >=0.32,<0.33, found 0.33.1"):
        plugin.register()
    monkeypatch.delenv(plugin.VARIABLE)
    with caplog.at_level("WARNING", logger="vllm.plugins.mustdrop"):
        plugin.register()


def test_registering_twice_changes_nothing():
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from mustdrop.integrations import vllm as plugin

    plugin.register()
    first = MODELS_CONFIG_MAP[ARCHITECTURE].mustdrop_inner
    plugin.register()
    assert MODELS_CONFIG_MAP[ARCHITECTURE].mustdrop_inner is first
