"""Qwen2.5-Omni and Qwen3-Omni, the thinker: a Qwen-VL that hears as well; audio tokens are text to mustdrop."""

from __future__ import annotations

from typing import Any

from torch import nn

from mustdrop.adapters.base import Tower
from mustdrop.adapters.qwen2_vl import Qwen25VL, packed_tower
from mustdrop.adapters.qwen3_vl import Qwen3VLMoe
from mustdrop.cost import linear_flops


class Qwen25Omni(Qwen25VL):
    """`Qwen2_5OmniThinkerForConditionalGeneration`; of the whole model, patch `model.thinker`."""

    name = "qwen2_5_omni_thinker"
    since = "5.23"
    classes = ("Qwen2_5OmniThinkerForConditionalGeneration",)
    token_types: str | None = None

    def base(self, model: Any) -> nn.Module:
        """What owns the towers."""
        module: nn.Module = seeing(model)
        return module

    def text(self, model: Any) -> nn.Module:
        """The text model."""
        module: nn.Module = reading(model)
        return module

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """One tower for images and videos."""
        return packed_tower(seeing(model).visual)

    def projector_flops(self, model: Any) -> int:
        """The merger."""
        return linear_flops(seeing(model).visual.merger)


class Qwen3Omni(Qwen3VLMoe):
    """`Qwen3OmniMoeThinkerForConditionalGeneration`; of the whole model, patch `model.thinker`."""

    name = "qwen3_omni_moe_thinker"
    since = "5.23"
    classes = ("Qwen3OmniMoeThinkerForConditionalGeneration",)
    token_types: str | None = None

    def base(self, model: Any) -> nn.Module:
        """What owns the towers."""
        module: nn.Module = seeing(model)
        return module

    def text(self, model: Any) -> nn.Module:
        """The text model."""
        module: nn.Module = reading(model)
        return module

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """One tower for images and videos."""
        return packed_tower(seeing(model).visual)

    def projector_flops(self, model: Any) -> int:
        """The mergers."""
        return linear_flops(nn.ModuleList([seeing(model).visual.merger, *merger_list(seeing(model).visual)]))


def seeing(model: Any) -> Any:
    """The module that owns the towers: the base model, or before transformers 5.23 the thinker itself."""
    return model.model if hasattr(model.model, "visual") else model


def reading(model: Any) -> Any:
    """The text model."""
    return getattr(model.model, "language_model", model.model)


def merger_list(visual: Any) -> list[nn.Module]:
    """The mergers of DeepStack, under either of their names."""
    return list(getattr(visual, "deepstack_merger_list", None) or getattr(visual, "merger_list", []))
