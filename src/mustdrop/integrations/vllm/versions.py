"""What differs, or may differ, between versions of vLLM: all of it is here."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any


class V032:
    """vLLM 0.32.

    Its runner keeps positions per request for models with M-RoPE only, and lets a model change them after the encoder
    only where video pruning is on. Both are said by configuration fields:

    * `mrope_section` on the outer configuration: the text model has a configuration of its own, so its rotary embedding
      is what it was;
    * `video_pruning_rate` so small that 1 - rate is 1: on, and no token less.
    """

    SWITCH = 1e-17

    @classmethod
    def is_switch(cls, rate: float) -> bool:
        """Whether a video pruning rate is our own."""
        return rate == cls.SWITCH

    @classmethod
    def keep_positions(cls, model_config: Any) -> None:
        """Have the runner ask the model for positions, before and after the encoder."""
        if not model_config.uses_mrope:
            model_config.hf_config.mrope_section = [1, 1, 1]
        model_config.multimodal_config.video_pruning_rate = cls.SWITCH

    @classmethod
    def took_effect(cls, model_config: Any) -> bool:
        """Whether it will."""
        return bool(model_config.uses_mrope and model_config.multimodal_config.is_multimodal_pruning_enabled())

    @classmethod
    def without_video_pruning(cls, info: Any) -> Any:
        """A processor's description of its model, for which vLLM's own video pruning is off."""
        model_config = copy.copy(info.ctx.model_config)
        model_config.multimodal_config = copy.copy(model_config.multimodal_config)
        model_config.multimodal_config.video_pruning_rate = None
        own = copy.copy(info)
        own.ctx = replace(info.ctx, model_config=model_config)
        return own

    @classmethod
    def repair_runner(cls) -> None:
        """Have the runner for CPUs know that positions may change, which the one for GPUs learns as it loads."""
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        from vllm.model_executor.models.interfaces import supports_multimodal_pruning
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        if "is_multimodal_pruning_enabled" in vars(CPUModelRunner):
            return

        def enabled(runner: Any) -> bool:
            config, model = runner.model_config.multimodal_config, getattr(runner, "model", None)
            return bool(
                model is not None
                and config is not None
                and config.is_multimodal_pruning_enabled()
                and supports_multimodal_pruning(model)
            )

        def ignore(runner: Any, value: bool) -> None:
            pass

        CPUModelRunner.is_multimodal_pruning_enabled = property(enabled, ignore)

    @classmethod
    def multimodal(cls) -> set[str]:
        """Names of vLLM's own models that take images, videos or sound."""
        from vllm.model_executor.models.registry import _MULTIMODAL_MODELS

        return set(_MULTIMODAL_MODELS)

    @classmethod
    def element(cls, modality: str, data: Any) -> Any:
        """A field of a processed image or video that stays on the host, and stays with items that a cache covers."""
        from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalFieldElem

        return MultiModalFieldElem(data=data, field=MultiModalFieldConfig.batched(modality, keep_on_cpu=True).field)


Version = V032
