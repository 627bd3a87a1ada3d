"""What a patched model refuses, by name and before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop import kv
from mustdrop.adapters.base import Adapter, Modality
from mustdrop.compat import LinearAttentionLayer, Span, checkpoints_activations
from mustdrop.errors import CacheStateError, ConfigError, UnsupportedModelError, UnsupportedOptionError
from mustdrop.pruners.vision_rules import PictureRule
from mustdrop.runtime import attention_capture, tensor_parallel
from mustdrop.runtime.masks_flex import FLEX

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime
    from mustdrop.runtime.state import Forward


def model(runtime: Runtime) -> None:
    """Raise `UnsupportedOptionError` for a model that cannot be patched."""
    backend(runtime)
    parts = getattr(runtime.model, "_tp_size", None) or 1
    if parts == 1:
        return
    instead = "Load the model without tp_plan and tp_size; device_map='auto' spreads whole layers over several devices."
    if getattr(runtime.model, "hf_quantizer", None) is not None:
        raise UnsupportedOptionError(
            f"a quantised model in tensor parallel (tp_size={parts}) cannot be pruned: its packed weights do not say "
            f"which processes share its heads. {instead}"
        )
    if not tensor_parallel.is_split(runtime.model):
        raise UnsupportedOptionError(
            f"a model in tensor parallel (tp_size={parts}) whose weights are no DTensors cannot be pruned: nothing "
            "says which processes share its heads, and each would score the tokens by its own and drop others than its "
            f"neighbours. Newer versions of transformers split weights into DTensors. {instead}"
        )


def call(runtime: Runtime, kwargs: dict[str, Any]) -> None:
    """Raise `UnsupportedOptionError` for a call that cannot be pruned; settings may have changed since `patch`."""
    backend(runtime)
    mask = kwargs.get("attention_mask")
    if mask is not None and runtime.implementation == FLEX and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UnsupportedOptionError(
            f"attn_implementation={FLEX!r} with an attention mask of somebody's own ({type(mask).__name__}) cannot be "
            "pruned: nothing says which tokens are padding. Pass a mask of (rows, tokens)."
        )
    if (runtime.model.training or torch.is_grad_enabled()) and checkpoints_activations(runtime.base):
        raise UnsupportedOptionError(
            "training a patched model with gradient checkpointing is not supported: the layers would run twice. "
            "Call model.gradient_checkpointing_disable(), or unpatch the model while it trains."
        )


def backend(runtime: Runtime) -> None:
    """Raise `UnsupportedOptionError` for an attention implementation of the text model that cannot be pruned."""
    name = runtime.implementation
    if name.startswith("paged") or ("flex" in name and name != FLEX):
        raise UnsupportedOptionError(
            f"attn_implementation={name!r} cannot be pruned (its masks have no rows and columns): "
            f"use model.set_attn_implementation('sdpa')."
        )
    if name == FLEX and not getattr(runtime.text, "_supports_flex_attn", False):
        raise UnsupportedOptionError(
            f"{runtime.adapter.name} with attn_implementation={name!r} cannot be pruned: transformers does not support "
            f"it in {type(runtime.text).__name__}. Use model.set_attn_implementation('sdpa')."
        )
    if runtime.adapter.refuses_flash and "flash" in name:
        raise UnsupportedOptionError(
            f"{runtime.adapter.name} with attn_implementation={name!r} cannot be pruned: "
            f"{runtime.adapter.refuses_flash}. Use model.set_attn_implementation('sdpa')."
        )


def windows(runtime: Runtime, spans: list[Span | None], forward: Forward) -> None:
    """Raise `UnsupportedOptionError` for a pass whose windows a kernel would count wrongly.

    Flash attention counts the entries that are left, and a window counts positions.
    """
    if not forward.flash or not runtime.method.drops:
        return
    sizes = [span.size for span in spans if span is not None]
    if sizes and forward.end > min(sizes):
        raise UnsupportedOptionError(
            f"{runtime.adapter.name} with attn_implementation={runtime.implementation!r} and a sliding window of "
            f"{min(sizes)} tokens cannot be pruned over a sequence of {forward.end}: its kernel would count what is "
            "left instead of positions. Use model.set_attn_implementation('sdpa')."
        )


def no_static(runtime: Runtime) -> str | None:
    """Why a static cache cannot be used, None if it can."""
    if runtime.method.decode is not None and runtime.method.decode.reads_steps:
        return (
            "decode_keep (DecodeCachePruner.keep) moves entries between decode steps, and a static cache is there "
            "so that nothing moves. Use a DynamicCache, a method without decode_keep, or one whose entries leave once, "
            "at the end of the prefill (DecodeCachePruner.after_prefill)."
        )
    name = runtime.implementation
    if "flash" in name:
        return (
            f"attn_implementation={name!r} has no mask that could hide the room for later tokens. "
            "Use model.set_attn_implementation('sdpa'), or a DynamicCache."
        )
    if name == FLEX:
        return (
            f"attn_implementation={FLEX!r} makes a new mask for every step, which a compiled step cannot. "
            "Use model.set_attn_implementation('sdpa'), or a DynamicCache."
        )
    return None


def media(runtime: Runtime, totals_of: dict[str, list[int]], kwargs: dict[str, Any]) -> None:
    """Refuse media that do not fill the prompts' placeholders, before any work.

    Raises:
        ConfigError: they do not; the message says how many there are of each.
    """
    for modality in runtime.modalities:
        given = [name for name in modality.pixels if isinstance(kwargs.get(name), Tensor)]
        if not given:
            continue
        pixels(given[0], kwargs[given[0]], modality)
        layouts = runtime.adapter.layouts(runtime.model, modality.name, kwargs)
        made, wanted = sum(layout.size for layout in layouts), sum(totals_of[modality.name])
        if made != wanted:
            raise ConfigError(
                f"the prompts hold {wanted} {modality.name} tokens (id {modality.token}) and do not match the "
                f"{modality.name}s in {given[0]}, which make {made} features. Do the processor and the config of "
                "the model agree (patch size, image size, merge size)? Was the prompt truncated?"
            )


def cache(runtime: Runtime, given: Any) -> None:
    """Refuse a cache that cannot be pruned, and one that another model filled.

    Raises:
        UnsupportedOptionError: a kind of cache that cannot be pruned.
        CacheStateError: entries of a model with other layers or other keys.
    """
    kv.check(given, no_static(runtime))
    holding = [layer for layer in given.layers if not isinstance(layer, LinearAttentionLayer)]
    filled = [layer for layer in holding if int(layer.get_seq_length())]
    keeping = [i for i in range(runtime.depth) if i not in runtime.recurrent]
    if filled and len(filled) != len(keeping):
        raise CacheStateError(
            f"this cache holds entries of {len(filled)} layers, {type(runtime.model).__name__} has {len(keeping)} "
            "decoder layers that keep some: another model made it. Start with a new cache."
        )
    for i, layer in zip(keeping, filled, strict=False):
        block = runtime.layers[i]
        if not isinstance(layer.keys, Tensor) or layer.keys.ndim != 4:
            continue
        heads, width = int(layer.keys.shape[1]), int(layer.keys.shape[-1])
        attention = attention_capture.attention_of(block)
        made = getattr(getattr(attention, "k_proj", None), "out_features", None)
        # in tensor parallel some of the heads are here, or, where a plan gathers what it split, all
        parts = {1, 1 if attention is None else tensor_parallel.size(tensor_parallel.group_of(attention))}
        config = runtime.text.config
        counts = (getattr(config, name, heads) for name in ("num_key_value_heads", "num_attention_heads"))
        known = {1, *counts}  # latent attention stores one head for all
        if (made is not None and made not in {heads * width * n for n in parts}) or (
            made is None and known.isdisjoint(heads * n for n in parts)
        ):
            raise CacheStateError(
                f"this cache holds keys of {heads} heads x {width} at layer {i}, {type(runtime.model).__name__} makes "
                f"{f'{made} numbers' if made else f'keys of {sorted(known)} heads'} per token there: another model "
                "made it. Start with a new cache."
            )


def pixels(name: str, values: Any, modality: Modality) -> None:
    """Raise `ConfigError` for media without a single pixel, which fail in strange places otherwise."""
    if isinstance(values, Tensor) and not values.numel():
        raise ConfigError(
            f"{name} has shape {tuple(values.shape)}: a {modality.name} without "
            f"{'frames' if modality.name == 'video' else 'pixels'}. Leave {name} out of the call, and its "
            "tokens out of the prompt."
        )


def pictures(rule: object, adapter: Adapter) -> None:
    """Raise `UnsupportedModelError` for a rule that changes pictures, and a family whose pictures it cannot change."""
    if isinstance(rule, PictureRule) and adapter.fixed_pictures:
        raise UnsupportedModelError(
            f"{type(rule).__name__} resizes pictures, and those of the {adapter.name} family cannot be: "
            f"{adapter.fixed_pictures} Give its processor a smaller picture (or its size argument), or use the nearest "
            'method that works here: mustdrop.patch(model, "pooling", keep=...).'
        )
