"""What one family's fixture states: a tiny configuration, and what the processor would make of small media for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from einops import rearrange
from torch import Tensor

from mustdrop.adapters.base import Adapter

VOCABULARY, IMAGE, VIDEO = 512, 500, 501


class Family(ABC):
    """The tiny models of one family: they run in milliseconds, and need no download.

    Attributes:
        of: class of the adapter whose models it makes, and of its subclasses without a fixture of their own.
        adapter: what it states of the family.
    """

    of: type[Adapter]

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Configuration, as a dictionary with `model_type`."""

    @abstractmethod
    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """What the processor would return.

        Args:
            model: a model of `config`.
            modality: key of the adapter's `media`.
            images: one per medium, (3, height, width) or, for a video, (frames, 3, height, width), of `sizes`.

        Returns:
            The arguments for the model, and per medium the ids of its run in the prompt.
        """

    def types(self, kinds: Tensor) -> dict[str, Tensor]:
        """Arguments that say so for a prompt whose tokens are text (0), image (1) or video (2)."""
        return {} if self.adapter.token_types is None else {self.adapter.token_types: kinds}

    def rows(self, arguments: dict[str, Any], counts: list[int]) -> dict[str, Any]:
        """Arguments of `media` for prompts with `counts` media each; most families do not care."""
        return arguments

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Shapes of media that `media` takes, for tests to draw from."""
        return ((3, 24, 24),)


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
