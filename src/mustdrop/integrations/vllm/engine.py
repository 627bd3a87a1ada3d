"""The engine's configuration: what pruning needs of it, and what it refuses, by name, before a model loads."""

from __future__ import annotations

from typing import Any

from mustdrop.errors import UnsupportedOptionError
from mustdrop.integrations.vllm import settings
from mustdrop.integrations.vllm.versions import Version

# Rotary tables of these kinds are computed from the frequencies alone, so that they can be made longer.
EXTENSIBLE = ("default", "linear", "llama3")
# How much longer they are made: positions of dropped tokens stay empty, so a prompt reaches further.
ROOM = 4


def prepare(model_config: Any) -> None:
    """Set what makes vLLM's runner keep the positions that we give; called while the configuration is built.

    Raises:
        MustDropError: settings that `patch` would refuse, too, or that cannot work in a server.
        UnsupportedOptionError: vLLM's own video pruning is on.
    """
    multimodal = model_config.multimodal_config
    if multimodal is None:
        return
    settings.of(model_config.hf_config)
    if multimodal.video_pruning_rate and not Version.is_switch(multimodal.video_pruning_rate):
        raise UnsupportedOptionError(
            f"--video-pruning-rate {multimodal.video_pruning_rate} prunes videos, and so does mustdrop: leave one out."
        )
    Version.keep_positions(model_config)


def check(vllm_config: Any) -> None:
    """Refuse what pruning does not support.

    Raises:
        UnsupportedOptionError: the first such option, and what to do.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model is None or model.multimodal_config is None:
        return
    serving = settings.of(model.hf_config)
    compilation, lora = vllm_config.compilation_config, vllm_config.lora_config
    multimodal = model.multimodal_config
    options = {
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "LoRA on the vision tower (--enable-tower-connector-lora)": getattr(lora, "enable_tower_connector_lora", False),
        "CUDA graphs of the encoder (cudagraph_mm_encoder)": compilation.cudagraph_mm_encoder,
        "embeddings in place of images (--enable-mm-embeds)": multimodal.enable_mm_embeds,
        f"{settings.REQUEST} in --mm-processor-kwargs (give keep in the settings)": settings.REQUEST
        in (multimodal.mm_processor_kwargs or {}),
    }
    if serving.pruner.reads:
        options["a compiled encoder (compile_mm_encoder), whose attention cannot be read"] = (
            compilation.compile_mm_encoder
        )
        options["--mm-encoder-tp-mode data, where no process sees the attention of all images"] = (
            multimodal.mm_encoder_tp_mode == "data" and parallel.tensor_parallel_size > 1
        )
    for option, given in options.items():
        if given:
            raise UnsupportedOptionError(f"mustdrop ({serving.method}) does not support {option}: leave it out.")
    _announce(model, serving)


def rotary_room(text_config: Any) -> bool:
    """Whether the rotary tables of a text model can be made longer than its configuration says."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    kinds = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    return all(kind.get("rope_type", "default") in EXTENSIBLE for kind in kinds)


def positions(text_config: Any) -> int | None:
    """How many positions the rotary tables of a served text model have; None if its configuration does not say."""
    known: int | None = getattr(text_config, "max_position_embeddings", None)
    return known if known is None or not rotary_room(text_config) else ROOM * known


def _announce(model_config: Any, serving: settings.Serving) -> None:
    from vllm.logger import init_logger

    kept = f"{serving.keep:.1%}" if isinstance(serving.keep, float) else f"{serving.keep} tokens"
    init_logger("vllm.plugins.mustdrop").info_once(
        "mustdrop: %s keeps %s of every image and video (%s).",
        serving.method,
        kept,
        ", ".join(model_config.architectures),
    )
