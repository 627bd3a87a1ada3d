"""What a pruned model's configuration needs, set while vLLM builds it: in the front end, before any worker starts."""

from __future__ import annotations

from typing import Any

from mustdrop.integrations.vllm import ARCHITECTURES, NOT_YET, VARIABLE


def install(called: str, architecture: str) -> None:
    """Have vLLM ask us about the configuration of models of a name.

    Args:
        called: the name.
        architecture: the model of vLLM that it stands for; what vLLM itself does with its configuration stays.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    inner = MODELS_CONFIG_MAP.get(architecture)
    inner = getattr(inner, "mustdrop_inner", inner)
    MODELS_CONFIG_MAP[called] = _hook(inner)


def refuse(called: str, architecture: str) -> None:
    """Have vLLM stop with a sentence where a model is asked for that is not pruned yet."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    class Refusal:
        mustdrop_inner = MODELS_CONFIG_MAP.get(architecture)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            """Nothing to add."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            """Raise."""
            reason = NOT_YET.get(architecture, f"served are {', '.join(ARCHITECTURES)}. Start it without {VARIABLE}.")
            raise NotImplementedError(f"mustdrop does not prune {architecture} in vLLM yet: {reason}")

    MODELS_CONFIG_MAP[called] = Refusal


def _hook(inner: Any) -> Any:
    class Hook:
        mustdrop_inner = inner

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            """Of the engine: refuse what pruning does not support."""
            if inner is not None:
                inner.verify_and_update_config(vllm_config)
            from mustdrop.integrations.vllm import engine

            engine.check(vllm_config)

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            """Of the model: have the runner keep the positions that a pruned prompt has."""
            if inner is not None:
                inner.verify_and_update_model_config(model_config)
            from mustdrop.integrations.vllm import engine

            engine.prepare(model_config)

    return Hook
