"""What a model may not be or do while it is patched: refused with what to do instead, before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mustdrop.compat import checkpoints_activations
from mustdrop.errors import UnsupportedOptionError

if TYPE_CHECKING:
    from mustdrop.runtime.core import Runtime


def check_model(runtime: Runtime) -> None:
    """Raise `UnsupportedOptionError` for a model that cannot be patched."""
    check_backend(runtime)
    parts = getattr(runtime.model, "_tp_size", None) or 1
    if parts > 1:
        raise UnsupportedOptionError(
            f"a model in tensor parallel cannot be pruned (tp_size={parts}, expected 1): each process holds some of "
            "the attention heads, would score the tokens by these alone and drop others than its neighbours. Load the "
            "model without tp_plan and tp_size; device_map='auto' spreads whole layers over several devices."
        )


def check_call(runtime: Runtime) -> None:
    """Raise `UnsupportedOptionError` for a call that cannot be pruned; settings may have changed since `patch`."""
    check_backend(runtime)
    if (runtime.model.training or torch.is_grad_enabled()) and checkpoints_activations(runtime.base):
        raise UnsupportedOptionError(
            "training a patched model with gradient checkpointing is not supported: the layers would run twice. "
            "Call model.gradient_checkpointing_disable(), or unpatch the model while it trains."
        )


def check_backend(runtime: Runtime) -> None:
    """Raise `UnsupportedOptionError` for an attention implementation whose masks cannot be cut."""
    name = runtime.implementation
    if name.startswith("paged") or "flex" in name:
        raise UnsupportedOptionError(
            f"attn_implementation={name!r} cannot be pruned (its masks have no rows and columns): "
            f"use model.set_attn_implementation('sdpa')."
        )
    if runtime.flash and runtime.adapter.refuses_flash:
        raise UnsupportedOptionError(
            f"{runtime.adapter.name} with attn_implementation={name!r} cannot be pruned: "
            f"{runtime.adapter.refuses_flash}. Use model.set_attn_implementation('sdpa')."
        )
