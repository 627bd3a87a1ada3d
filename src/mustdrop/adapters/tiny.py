"""Tiny random models of every family, which run in milliseconds: for tests, examples and measurements of fidelity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from mustdrop.adapters.base import Adapter

VOCABULARY, IMAGE, VIDEO = 512, 500, 501


def text(kind: str, **settings: Any) -> dict[str, Any]:
    """Five decoder layers, 64 wide, with grouped keys."""
    return {
        "model_type": kind,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        **settings,
    }


def tower(kind: str, **settings: Any) -> dict[str, Any]:
    """Four encoder layers over 6 x 6 patches."""
    sides = {"image_size": 24, "patch_size": 4}
    if kind == "clip_vision_model":
        sides |= {"projection_dim": 32, "initializer_factor": 4.0}  # type: ignore[dict-item]
    if kind == "siglip_vision_model":
        sides |= {"vision_use_head": False}
    return {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "initializer_range": 0.15,
        **sides,
        **settings,
    }


def clip(**settings: Any) -> dict[str, Any]:
    """A CLIP tower."""
    return tower("clip_vision_model", **settings)


def siglip(**settings: Any) -> dict[str, Any]:
    """A SigLIP tower without its pooling head."""
    return tower("siglip_vision_model", **settings)


def tokens(**more: Any) -> dict[str, Any]:
    """Placeholder ids, as current configurations name them."""
    return {"image_token_id": IMAGE, "video_token_id": VIDEO, **more}


def packed_patches(frames: Tensor, patch: int = 4, merge: int = 2) -> tuple[Tensor, list[int]]:
    """What a Qwen-VL processor makes of an image or video.

    Args:
        frames: (2 * t, 3, height, width), or (3, height, width) for an image.
        patch: side of a patch.
        merge: side of the square of patches that makes one feature.

    Returns:
        (patches, 3 * 2 * patch * patch), the patches of each feature one after the other, and [t, rows, columns].
    """
    if frames.ndim == 3:
        frames = frames.expand(2, -1, -1, -1)
    made = rearrange(
        frames,
        "(t f) c (h a p) (w b q) -> (t h w a b) (c f p q)",
        f=2,
        a=merge,
        b=merge,
        p=patch,
        q=patch,
    )
    return made, [len(frames) // 2, frames.shape[-2] // patch, frames.shape[-1] // patch]


def build(adapter: Adapter, attention: str = "sdpa", seed: int = 0) -> Any:
    """A model of the adapter's tiny configuration with random weights, in float32 and eval mode.

    Its attention is peaky, so that decisions have margins; parameters that start at zero are random too, so that
    every path matters.

    Args:
        adapter: of the family.
        attention: attention implementation.
        seed: of the weights.
    """
    import transformers

    settings = adapter.tiny()
    del settings["model_type"]
    kind = next(getattr(transformers, name) for name in adapter.classes if hasattr(transformers, name))
    config = kind.config_class(**settings)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = kind(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("bias"):
                parameter.normal_(0, 0.05)
            elif not bool(parameter.any()):
                parameter.normal_(0, 0.1)
        # logits of about a quarter: 1e-5 is above the noise of float32 and far below any effect
        model.get_output_embeddings().weight.mul_(0.25)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model


def prompt(adapter: Adapter, model: Any, modality: str, pictures: list[Tensor], words: int = 6) -> dict[str, Tensor]:
    """Inputs of one prompt for a tiny model: a few words, the media, a few words.

    Args:
        adapter: of the family.
        model: made by `build`.
        modality: "image" or "video".
        pictures: of shapes that `adapter.tiny_sizes` names.
        words: text tokens after the media, which ask.
    """
    arguments, runs = adapter.tiny_media(model, modality, pictures)
    line = [1, 20, 21, *(token for run in runs for token in run), *range(30, 30 + words)]
    inputs = dict(adapter.tiny_rows(arguments, [len(pictures)]))
    inputs |= {
        "input_ids": torch.tensor([line], dtype=torch.long, device="cpu"),
        "attention_mask": torch.ones(1, len(line), dtype=torch.long, device="cpu"),
    }
    (token,) = (m.token for m in adapter.modalities(model) if m.name == modality)
    kinds = (inputs["input_ids"] == token).long() * (1 if modality == "image" else 2)
    return inputs | adapter.tiny_types(kinds)
