"""Tiny random checkpoints of the served families, with processors and word tokenizers, as folders that vLLM loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mustdrop.adapters import registry
from tests.families import fixture_of
from tests.families.base import IMAGE, VIDEO

WIDTH, HEADS, HEAD = 128, 4, 32  # what vLLM's attention for CPUs can do
START, END, BEGIN_IMAGE, END_IMAGE = 502, 503, 504, 505
WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 480)}}
NEWLINES = {"\n" * n: 480 + n for n in range(1, 5)}
SIDE, TILE = 24, 48


def tokenizer(special: dict[str, int], **named: str) -> PreTrainedTokenizerFast:
    """One word, one token; `special` ones stand anywhere in the text."""
    vocabulary = WORDS | special
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=named
    )


def config(family: str) -> dict[str, Any]:
    """The adapter's tiny configuration, with heads as wide as vLLM's attention for CPUs wants them."""
    found = fixture_of(family).config()
    text = found["text_config"]
    text |= {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 2, "intermediate_size": 192}
    text |= {"num_hidden_layers": min(4, text["num_hidden_layers"])}
    if "layer_types" in text:
        text["layer_types"] = [*text["layer_types"][:3], "full_attention"]
    if "head_dim" in text:
        text["head_dim"] = HEAD
    if text.get("sliding_window"):
        text["sliding_window"] = 1024  # as in published checkpoints: wider than the prompts of the tests
    if "query_pre_attn_scalar" in text:
        text["query_pre_attn_scalar"] = HEAD
    rope = text.get("rope_parameters") or {}
    if "mrope_section" in rope:
        text["rope_parameters"] = rope | {"mrope_section": [6, 5, 5]}
        if family.startswith("qwen3"):
            text["rope_parameters"]["mrope_interleaved"] = True
        if family == "qwen3_vl_moe":
            text["norm_topk_prob"] = True  # as published checkpoints say
        width = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
        found["vision_config"][width] = WIDTH
    return found


def llava(name: str) -> Any:
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    return transformers.LlavaProcessor(
        images,
        tokenizer({"<image>": IMAGE}),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_next(name: str) -> Any:
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=SIDE, image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]]
    )
    return transformers.LlavaNextProcessor(
        images,
        tokenizer({"<image>": IMAGE}),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_onevision(name: str) -> Any:
    size = {"height": SIDE, "width": SIDE}
    images = transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]])
    return transformers.LlavaOnevisionProcessor(
        images,
        tokenizer({"<image>": IMAGE, "<video>": VIDEO}),
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=36,
        vision_feature_select_strategy="full",
    )


def internvl(name: str) -> Any:
    size = {"height": TILE, "width": TILE}
    special = {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": START, "</img>": END}
    words = tokenizer(
        special,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        words,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=36,
    )


def gemma3(name: str) -> Any:
    special = {"<image>": IMAGE, "<boi>": BEGIN_IMAGE, "<eoi>": END_IMAGE, **NEWLINES}
    words = tokenizer(special, image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    images = transformers.Gemma3ImageProcessor(size={"height": TILE, "width": TILE})
    return transformers.Gemma3Processor(images, words, image_seq_length=36)


def idefics3(name: str) -> Any:
    rows = {f"<row_{i}_col_{j}>": 484 + 2 * i + j for i in (1, 2) for j in (1, 2)}
    special = {
        "<image>": IMAGE,
        "<fake_token_around_image>": START,
        "<global-img>": END,
        "<end_of_utterance>": BEGIN_IMAGE,
        **rows,
    }
    sides = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
    if name == "smolvlm":
        return transformers.SmolVLMProcessor(
            transformers.SmolVLMImageProcessor(**sides),
            tokenizer(special),
            transformers.SmolVLMVideoProcessor(
                size={"longest_edge": TILE}, max_image_size={"longest_edge": TILE}, fps=1, num_frames=2
            ),
            image_seq_len=36,
        )
    return transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(**sides), tokenizer(special), image_seq_len=36
    )


def mistral3(name: str) -> Any:
    special = {"[IMG]": IMAGE, "[IMG_BREAK]": START, "[IMG_END]": END}
    images = transformers.PixtralImageProcessor(size={"longest_edge": TILE}, patch_size={"height": 4, "width": 4})
    return transformers.PixtralProcessor(images, tokenizer(special), patch_size=4, spatial_merge_size=2)


def qwen(name: str) -> Any:
    special = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
    special |= {"<|im_start|>": 506, "<|im_end|>": 507}
    sides = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    shades = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # the same for videos: vLLM knows one of them
    videos = transformers.Qwen3VLVideoProcessor if name.startswith("qwen3") else transformers.Qwen2VLVideoProcessor
    sizes = {"shortest_edge": 256, "longest_edge": 25600}
    kind = {
        "qwen2_vl": transformers.Qwen2VLProcessor,
        "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
    }.get(name, transformers.Qwen3VLProcessor)
    return kind(
        transformers.Qwen2VLImageProcessor(**sides, **shades, min_pixels=256, max_pixels=6400),
        tokenizer(special),
        videos(**sides, **shades, size=sizes),
    )


# family -> its processor, how a prompt names an image and a video
FAMILIES: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "llava": (llava, "<image>", ""),
    "llava_next": (llava_next, "<image>", ""),
    "llava_onevision": (llava_onevision, "<image>", "<video>"),
    "internvl": (internvl, "<IMG_CONTEXT>", "<video>"),
    "gemma3": (gemma3, "<boi>", ""),
    "idefics3": (idefics3, "<image>", ""),
    "smolvlm": (idefics3, "<image>", ""),
    "mistral3": (mistral3, "[IMG]", ""),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
        (qwen, "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    ),
}


def save(family: str, folder: Path) -> tuple[Any, Any]:
    """Write a checkpoint; the model in float32 and its processor."""
    settings = config(family)
    adapter = registry()[family]
    kind = getattr(transformers, adapter.classes[0])
    torch.manual_seed(0)
    made = kind._from_config(kind.config_class(**settings), dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():  # answers that differ from each other
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1 and "norm" not in name:
                parameter.normal_(0, 0.1)
    made.generation_config.eos_token_id = None
    made.save_pretrained(folder)
    _rename(folder / "model.safetensors")
    processor = FAMILIES[family][0](family)
    processor.save_pretrained(folder)
    return made, processor


def _rename(path: Path) -> None:
    """Give weights the names and shapes that published checkpoints have, which vLLM reads."""
    weights = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(path).items()
    }
    named = {
        re.sub(
            r"vision_tower\.(?=(embeddings|encoder|pre_layrnorm|post_layernorm)\.)", "vision_tower.vision_model.", name
        )
        if not _has_own_names(weights)
        else name: tensor
        for name, tensor in weights.items()
    }
    save_file(named, path, metadata={"format": "pt"})


def _has_own_names(weights: dict[str, torch.Tensor]) -> bool:
    """InternViT calls its layers so."""
    return any(".encoder.layer." in name for name in weights)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth coloured noise."""
    source = np.random.default_rng(seed)
    coarse = source.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def video(seed: int, frames: int, width: int, height: int) -> np.ndarray:
    """(frames, height, width, 3) that changes from one picture to another."""
    first, last = (np.asarray(picture(seed + i, width, height), dtype=float) for i in (0, 100))
    shares = np.linspace(0, 1, frames)
    return np.stack([first * (1 - share) + last * share for share in shares]).astype(np.uint8)
