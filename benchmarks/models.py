"""Models with the sizes of real ones and random weights, and prompts for them: speed depends on sizes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from benchmarks import common

QWEN_IMAGE, QWEN_START, QWEN_END = 151655, 151652, 151653  # ids of the image's placeholder and of what is around it
QWEN_SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {  # text, vision, patches per side of the image
    "qwen2.5-vl-tiny": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4,
         "num_key_value_heads": 2},
        {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
         "fullatt_block_indexes": [1, 3]},
        16,
    ),
    "qwen2.5-vl-wide": (  # the real encoder's widths, few layers, and a small language model: for a CPU
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 4, "num_attention_heads": 14,
         "num_key_value_heads": 2},
        {"depth": 4, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 896,
         "fullatt_block_indexes": [0, 3]},
        48,
    ),
    "qwen2.5-vl-7b": (
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
         "num_key_value_heads": 4},
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
         "fullatt_block_indexes": [7, 15, 23, 31]},
        72,
    ),
}  # fmt: skip

NEXT_SIDE = 672  # pixels of a picture: 576 tokens of all of it, 2,304 of its four tiles, 48 line ends
NEXT_SIZES = {"llava-next-tiny": "tiny", "llava-next-7b": "llava-1.5-7b"}  # of `common.SIZES`


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: for the result file.
        model: on its device, in evaluation mode.
        prompt: (seed, batch) -> inputs for `generate`.
        vision: vision tokens of a prompt.
        text: its other tokens.
    """

    name: str
    model: Any
    prompt: Callable[[int, int], dict[str, Tensor]]
    vision: int
    text: int

    @property
    def tower(self) -> nn.Module:
        """The vision encoder."""
        inner = self.model.model
        return inner.visual if hasattr(inner, "visual") else inner.vision_tower  # type: ignore[no-any-return]


def subject(name: str, device: torch.device, attention: str, seed: int) -> Subject:
    """Build a model by name: one of `common.SIZES`, `NEXT_SIZES` or `QWEN_SIZES`."""
    if name in QWEN_SIZES:
        return _qwen(name, device, attention, seed)
    if name in NEXT_SIZES:
        return _next(name, device, attention, seed)
    model = common.build(name, device, seed)
    model.set_attn_implementation(attention)
    text = common.BEFORE + common.AFTER
    return Subject(name, model, lambda seed, batch: common.prompt(model, seed, batch), common.VISION, text)


def _next(name: str, device: torch.device, attention: str, seed: int) -> Subject:
    text, vision = common.SIZES[NEXT_SIZES[name]]
    config = LlavaNextConfig(
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=8192, **text),
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **vision),
        image_token_index=common.IMAGE,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(seed)
    with device:
        made = LlavaNextForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    tiles, side = NEXT_SIDE // 336, NEXT_SIDE // 14
    model, tokens = made.eval(), common.VISION + side * side + side

    def prompt(seed: int, batch: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, 31999, (batch, common.BEFORE + common.AFTER), generator=generator)
        image = torch.full((batch, tokens), common.IMAGE)
        ids = torch.cat([words[:, : common.BEFORE], image, words[:, common.BEFORE :]], 1)
        coarse = torch.randn(batch, 3, 18, 18, generator=generator)
        large = nn.functional.interpolate(coarse, size=(NEXT_SIDE, NEXT_SIDE), mode="bilinear")
        parts = [row for half in large.chunk(tiles, 2) for row in half.chunk(tiles, 3)]
        pixels = torch.stack([nn.functional.interpolate(large, size=(336, 336), mode="bilinear"), *parts], 1)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels.to(dtype),
            "image_sizes": torch.tensor([[NEXT_SIDE, NEXT_SIDE]] * batch),
        }
        return {key: value.to(device) for key, value in inputs.items()}

    return Subject(name, model, prompt, tokens, common.BEFORE + common.AFTER)


def _qwen(name: str, device: torch.device, attention: str, seed: int) -> Subject:
    text, vision, side = QWEN_SIZES[name]
    heads = text["num_attention_heads"]
    half = text["hidden_size"] // heads // 2
    rope = {"type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * (3 * half // 8), *[3 * half // 8] * 2]}
    config = Qwen2_5_VLConfig(
        text_config={"vocab_size": 152064, "max_position_embeddings": 32768, "rope_parameters": rope, **text},
        vision_config=vision,
        image_token_id=QWEN_IMAGE,
        vision_start_token_id=QWEN_START,
        vision_end_token_id=QWEN_END,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(seed)
    with device:
        made = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    model, tokens = made.eval(), side * side // 4

    def prompt(seed: int, batch: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, 30000, (batch, common.BEFORE + common.AFTER), generator=generator)
        words[:, common.BEFORE - 1], words[:, common.BEFORE] = QWEN_START, QWEN_END
        image = torch.full((batch, tokens), QWEN_IMAGE)
        ids = torch.cat([words[:, : common.BEFORE], image, words[:, common.BEFORE :]], 1)
        width = config.vision_config.in_channels * config.vision_config.temporal_patch_size * 14**2
        coarse = torch.randn(batch, width, 9, 9, generator=generator)  # neighbouring patches are alike, as in pictures
        smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
        grid = smooth.view(batch, width, side // 2, 2, side // 2, 2).permute(0, 2, 4, 3, 5, 1)  # as the processor packs
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == QWEN_IMAGE).int(),
            "pixel_values": grid.reshape(batch * side * side, width).to(dtype),
            "image_grid_thw": torch.tensor([[1, side, side]] * batch),
        }
        return {key: value.to(device) for key, value in inputs.items()}

    return Subject(name, model, prompt, tokens, common.BEFORE + common.AFTER)
