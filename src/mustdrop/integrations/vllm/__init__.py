"""vLLM: drops vision tokens after the encoder, before the language model sees them, without a fork.

vLLM finds `register` by the entry point in its group `vllm.general_plugins`, and calls it in each of its processes. So
this module imports nothing but the standard library, and calling it again changes nothing.

    MUSTDROP_VLLM='{"method": "divprune", "keep": 128}' vllm serve MODEL

See docs/serving.md.
"""

from __future__ import annotations

import os

VARIABLE = "MUSTDROP_VLLM"
PREFIX = "MustDrop"  # of the explicit architecture names, for --hf-overrides
SUPPORTED = ">=0.32,<0.33"

# Architecture, as vLLM's registry has it -> class in `models` that serves it.
ARCHITECTURES = {
    "Gemma3ForConditionalGeneration": "Gemma3",
    "Idefics3ForConditionalGeneration": "Idefics3",
    "InternVLForConditionalGeneration": "InternVL",
    "LlavaForConditionalGeneration": "Llava",
    "LlavaNextForConditionalGeneration": "LlavaNext",
    "LlavaOnevisionForConditionalGeneration": "LlavaOnevision",
    "Mistral3ForConditionalGeneration": "Mistral3",
    "Qwen2VLForConditionalGeneration": "Qwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen25VL",
    "Qwen3VLForConditionalGeneration": "Qwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3VLMoe",
    "SmolVLMForConditionalGeneration": "SmolVLM",
}

# What could be asked for and is not served yet -> why.
NOT_YET = {
    "InternVLChatModel": "its checkpoints need remote code; use one converted to InternVLForConditionalGeneration.",
    "PixtralForConditionalGeneration": "checkpoints in Mistral's own format have an encoder of their own in vLLM; use "
    "one in the format of transformers (LlavaForConditionalGeneration or Mistral3ForConditionalGeneration).",
    **dict.fromkeys(
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        "this vLLM asks for a transformers below 5.20, and mustdrop prunes the model from 5.23 on, so that nothing can "
        "be compared; patch it in transformers.",
    ),
}


def register() -> None:
    """Tell vLLM of the pruned models: under names of their own, and under vLLM's names if `MUSTDROP_VLLM` is set.

    Raises:
        ImportError: `MUSTDROP_VLLM` is set, and this vLLM is none that the plugin is tested with. Without the variable
            that is a warning, and nothing is registered.
    """
    import logging

    from vllm import __version__ as found

    wanted = bool(os.environ.get(VARIABLE))
    if not supported(found):
        text = (
            f"mustdrop's plugin is for vLLM {SUPPORTED}, found {found}: install such a version, or leave pruning out "
            f"by unsetting {VARIABLE}."
        )
        if wanted:
            raise ImportError(text)
        logging.getLogger("vllm.plugins.mustdrop").warning("%s Nothing is pruned.", text)
        return
    from vllm import ModelRegistry

    from mustdrop.integrations.vllm import hook
    from mustdrop.integrations.vllm.versions import Version

    for architecture, name in ARCHITECTURES.items():
        for called in (PREFIX + architecture, *((architecture,) if wanted else ())):
            ModelRegistry.register_model(called, f"{__name__}.models:{name}")  # imported when it is used
            hook.install(called, architecture)
    for architecture in NOT_YET:
        hook.refuse(PREFIX + architecture, architecture)
    if wanted:  # a server that is asked to prune must not start without
        for architecture in Version.multimodal() - ARCHITECTURES.keys():
            hook.refuse(architecture, architecture)


def supported(version: str) -> bool:
    """Whether a version of vLLM is in the tested range; builds such as 0.32.0+cpu are."""
    low, high = (tuple(map(int, part.lstrip("<>=").split("."))) for part in SUPPORTED.split(","))
    numbers = []
    for part in version.split("+")[0].split(".")[:2]:
        if not part.isdigit():
            return False
        numbers.append(int(part))
    return low <= tuple(numbers) < high
