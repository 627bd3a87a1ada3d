"""Writes the trained model as a Hugging Face folder: half-precision weights, processor, chat template."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerFast

from benchmarks.page_model.network import MERGE, PAIR, PATCH, TOKEN_ID

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|video_pad|>{% endif %}{% endfor %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}assistant {% for c in m['content'] %}{{ c['text'] }} {% endfor %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
SPECIAL = tuple(word for word in TOKEN_ID if word.startswith("<|"))
IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": PAIR,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token; a time such as `<1.2 seconds>` is taken apart into its digits."""
    words = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="<unk>"))
    times = pre_tokenizers.Split(Regex(r"<|\d(?=\.)|\.|(?<=\.)\d"), "isolated")
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), times])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=[word for word in SPECIAL if word not in ("<|endoftext|>", "<|im_end|>")],
        padding_side="left",
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def save(model: nn.Module, folder: Path) -> None:
    """Saves the checkpoint folder.  Answers are greedy and at most 12 tokens long unless asked otherwise."""
    model.generation_config = GenerationConfig(
        eos_token_id=TOKEN_ID["<|im_end|>"],
        pad_token_id=TOKEN_ID["<|endoftext|>"],
        max_new_tokens=12,
        do_sample=False,
    )
    model.to(torch.float16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
    tokenizer().save_pretrained(folder)
    image = {**IMAGE_PROCESSOR, "size": {"shortest_edge": 48 * 48, "longest_edge": 256 * 256}}
    video = {**IMAGE_PROCESSOR, "size": {"shortest_edge": 2 * 48 * 48, "longest_edge": 16 * 128 * 128}}
    video |= {"do_sample_frames": False, "video_processor_type": "Qwen3VLVideoProcessor"}
    _write(folder / "preprocessor_config.json", {**image, "image_processor_type": "Qwen2VLImageProcessor"})
    _write(folder / "video_preprocessor_config.json", video)
    _write(folder / "processor_config.json", {"processor_class": "Qwen3VLProcessor"})


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
