"""Qwen2.5-Omni and Qwen3-Omni, the thinker: a Qwen-VL that hears as well; audio tokens are text to mustdrop."""

from __future__ import annotations

from typing import Any

from torch import nn

from mustdrop.adapters.base import Tower
from mustdrop.adapters.qwen2_vl import Qwen25VL, packed_tower
from mustdrop.adapters.qwen3_vl import Qwen3VLMoe
from mustdrop.cost import linear_flops


class Thinker:
    """Where a thinker's parts are; what it shares with a Qwen-VL comes from the class beside this one."""

    since = "5.23"
    token_types: str | None = None

    def base(self, model: Any) -> nn.Module:
        """The module that owns the towers: the base model, or before transformers 5.23 the thinker itself."""
        owner: nn.Module = model.model if hasattr(model.model, "visual") else model
        return owner

    def text(self, model: Any) -> nn.Module:
        """The text model: of the base model, or before transformers 5.23 the base model itself."""
        module: nn.Module = getattr(model.model, "language_model", model.model)
        return module

    def tower(self, model: Any, modality: str = "image") -> Tower:
        """One tower for images and videos."""
        return packed_tower(self.base(model).visual)

    def projector_flops(self, model: Any) -> int:
        """The merger, and those of DeepStack where there are such."""
        return linear_flops(nn.ModuleList(self.tower(model).mergers))


class Qwen25Omni(Thinker, Qwen25VL):
    """`Qwen2_5OmniThinkerForConditionalGeneration`; of the whole model, patch `model.thinker`."""

    name = "qwen2_5_omni_thinker"
    classes = ("Qwen2_5OmniThinkerForConditionalGeneration",)


class Qwen3Omni(Thinker, Qwen3VLMoe):
    """`Qwen3OmniMoeThinkerForConditionalGeneration`; of the whole model, patch `model.thinker`."""

    name = "qwen3_omni_moe_thinker"
    classes = ("Qwen3OmniMoeThinkerForConditionalGeneration",)
