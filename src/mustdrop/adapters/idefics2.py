"""Idefics2: a perceiver resamples every image to a fixed number of latents, which lie nowhere in the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mustdrop.adapters.base import Adapter
from mustdrop.adapters.idefics3 import Idefics3
from mustdrop.cost import linear_flops
from mustdrop.layout import Layout

#: Why there is no vision stage after a resampler.
RESAMPLED = "its features are learned queries that read the whole image, so they lie on no grid of patches."


def resampled(size: int) -> Layout:
    """Features of a medium that stand for no part of the picture."""
    return Layout(
        (),
        torch.full((size,), -1, dtype=torch.long, device="cpu"),
        torch.full((size, 1), -1, dtype=torch.long, device="cpu"),
    )


class Idefics2(Idefics3):
    """`Idefics2ForConditionalGeneration`."""

    name = "idefics2"
    classes = ("Idefics2ForConditionalGeneration",)
    lacks = {"vision": RESAMPLED}  # noqa: RUF012

    def text(self, model: Any) -> nn.Module:
        """`model.model.text_model`."""
        return model.model.text_model  # type: ignore[no-any-return]

    tower = Adapter.tower  # raises

    def layouts(self, model: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """One medium per row of the batch: the latents of its images; images of zeros are padding."""
        latents = model.config.perceiver_config.resampler_n_latents
        counts = (arguments["pixel_values"] != 0).flatten(2).any(-1).sum(1).tolist()
        return [resampled(count * latents) for count in counts]

    def projector_flops(self, model: Any) -> int:
        """The layers that map a patch; the perceiver depends on the number of patches and is left out."""
        return linear_flops(model.model.connector.modality_projection)
