"""Writes the trained model as a Hugging Face folder: half-precision weights, processor, chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from network import TOKEN_ID
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import GenerationConfig, LlavaProcessor, PreTrainedTokenizerFast

from mustdrop.demo.scenes import IMAGE_SIZE, PATCH_SIZE

try:  # the image processor that needs no torchvision has had two names
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% endif %}{% endfor %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def _processor() -> LlavaProcessor:
    words = Tokenizer(models.WordLevel(TOKEN_ID, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", TOKEN_ID["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def save(model: nn.Module, folder: Path) -> None:
    """Saves the checkpoint folder.  Answers are greedy and at most 12 tokens long unless asked otherwise."""
    model.generation_config = GenerationConfig(
        bos_token_id=TOKEN_ID["<s>"],
        eos_token_id=TOKEN_ID["</s>"],
        pad_token_id=TOKEN_ID["<pad>"],
        max_new_tokens=12,
        do_sample=False,
    )
    model.to(torch.float16).save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(
        {_published_name(name): value for name, value in load_file(weights).items()},
        weights,
        {"format": "pt"},
    )
    weights.chmod(0o644)  # safetensors leaves it to its owner alone
    _processor().save_pretrained(folder)


def _published_name(name: str) -> str:
    """A weight's name as in the published LLaVA checkpoints, which every version of transformers 5 can load.

    Newer versions write the vision tower without its inner `vision_model`; older ones do not understand that.
    """
    return name if "vision_model." in name else name.replace("vision_tower.", "vision_tower.vision_model.", 1)
