"""Loads the bundled demo model: a tiny LLaVA that answers questions about `mustdrop.demo.scenes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

CHECKPOINT = Path(__file__).with_name("checkpoint")


def load(dtype: torch.dtype = torch.float32) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model, in evaluation mode and on the CPU, and its processor.  Nothing is downloaded."""
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype, local_files_only=True)
    processor = LlavaProcessor.from_pretrained(CHECKPOINT, local_files_only=True)
    return model.eval(), processor


def prompt(processor: LlavaProcessor, question: str) -> str:
    """The prompt, with the image before the question, that the model was trained on."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat: Any = [{"role": "user", "content": content}]  # the annotation upstream has no room for content parts
    text: str = processor.apply_chat_template(chat, add_generation_prompt=True)
    return text
