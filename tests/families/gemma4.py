"""Gemma 4: images of any size, padded and pooled by the places of their patches; per-layer embeddings in the text."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mustdrop.adapters.gemma4 import Gemma4
from tests.families.base import IMAGE, VIDEO, Family, text, tokens

_BEGIN, _END, _PATCHES = 504, 505, 96


class Gemma4Family(Family):
    """See `Gemma4`."""

    of = Gemma4

    def config(self) -> dict[str, Any]:
        """Three of five decoder layers see 16 tokens back, images whole; all have an embedding of their own."""
        kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
            "initializer_range": 0.15,
        }
        decoder = text(
            "gemma4_text",
            sliding_window=16,
            layer_types=kinds,
            use_bidirectional_attention="vision",
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=512,
            num_kv_shared_layers=0,
            global_head_dim=32,
        )
        return {
            "model_type": "gemma4",
            "vision_config": vision,
            "text_config": decoder,
            "audio_config": None,
            "tie_word_embeddings": False,
            **tokens(boi_token_id=_BEGIN, eoi_token_id=_END),
        }

    def media(self, model: Any, modality: str, images: list[Tensor]) -> tuple[dict[str, Any], list[list[int]]]:
        """Patches and their places, padded to a common number; a timestamp before each frame of a video."""
        pixels, places, runs, token = [], [], [], IMAGE if modality == "image" else VIDEO
        for image in images:
            frames, run = image[None] if image.ndim == 3 else image, []
            for t, frame in enumerate(frames):
                patches = rearrange(frame, "c (h p) (w q) -> (h w) (p q c)", p=4, q=4)
                y, x = torch.meshgrid(
                    *(torch.arange(n // 4, dtype=torch.long, device="cpu") for n in frame.shape[1:]), indexing="ij"
                )
                pad = _PATCHES - len(patches)
                pixels.append(torch.nn.functional.pad(patches, (0, 0, 0, pad)))
                place = torch.stack([x.flatten(), y.flatten()], -1)
                places.append(torch.nn.functional.pad(place, (0, 0, 0, pad), value=-1))
                stamp = [10 + t] if modality == "video" else []
                run += [*stamp, _BEGIN, *[token] * (len(patches) // 4), _END]
            runs.append(run)
        made = {f"{modality}_position_ids": torch.stack(places)}
        if modality == "image":
            return {**made, "pixel_values": torch.stack(pixels)}, runs
        frames_of = torch.tensor([len(video) for video in images], dtype=torch.long, device="cpu")
        return {**made, "pixel_values_videos": torch.stack(pixels), "num_frames_per_video": frames_of}, runs

    def sizes(self, modality: str) -> tuple[tuple[int, ...], ...]:
        """Square, wide and tall; two or three frames."""
        if modality == "image":
            return ((3, 32, 32), (3, 24, 48), (3, 40, 24))
        return ((3, 3, 24, 32), (2, 3, 32, 24))
