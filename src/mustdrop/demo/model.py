"""Loads the bundled models: a tiny LLaVA for `mustdrop.demo.scenes`, a tiny Qwen3-VL for `mustdrop.demo.tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Qwen3VLForConditionalGeneration

from mustdrop.demo.page_processor import PageProcessor
from mustdrop.errors import ConfigError, did_you_mean

CHECKPOINT = Path(__file__).with_name("checkpoint")
PAGE_CHECKPOINT = Path(__file__).with_name("page_checkpoint")
NAMES = ("scenes", "pages")


def load(name: str = "scenes", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A bundled model, in evaluation mode and on the CPU, and its processor.  Nothing is downloaded.

    Args:
        name: "scenes" is the LLaVA, "pages" the Qwen3-VL.
        dtype: of the weights.

    Raises:
        ConfigError: another name, or a model whose weights are missing.
    """
    if name not in NAMES:
        raise ConfigError(f"there is no bundled model {name!r}. {did_you_mean(name, NAMES)}")
    model: Any
    processor: Any
    if name == "scenes":
        model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype, local_files_only=True)
        processor = LlavaProcessor.from_pretrained(CHECKPOINT, local_files_only=True)
    elif not (PAGE_CHECKPOINT / "model.safetensors").exists():
        raise ConfigError(
            f"the model 'pages' is not part of this installation: there are no weights in {PAGE_CHECKPOINT}. Install "
            "mustdrop anew; in a checkout, `python -m benchmarks page_model export` writes them after training."
        )
    else:
        model = Qwen3VLForConditionalGeneration.from_pretrained(PAGE_CHECKPOINT, dtype=dtype, local_files_only=True)
        processor = PageProcessor.from_pretrained(PAGE_CHECKPOINT)
    return model.eval(), processor


def prompt(processor: Any, question: str, images: int = 1, videos: int = 0) -> str:
    """The prompt, with pictures and videos before the question, that the models were trained on."""
    content = [{"type": "image"}] * images + [{"type": "video"}] * videos + [{"type": "text", "text": question}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text
