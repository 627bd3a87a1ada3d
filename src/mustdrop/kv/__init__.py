"""Cache layers that store fewer entries than the sequence is long. The only package that knows Hugging Face caches.

Outside, a pruned layer speaks logical lengths: everything in transformers (positions, masks, chat continuation, crop)
goes on as if no token had been dropped. Inside, it stores only the entries that are left, and for each the logical
position it came from.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from mustdrop.compat import LinearAttentionLayer, cache_of, dynamic_cache
from mustdrop.errors import CacheStateError, UnsupportedOptionError
from mustdrop.kv.entries import Arrival, Held, Stored
from mustdrop.kv.growing import PrunedLayer
from mustdrop.kv.slots import Slots
from mustdrop.kv.state import PrunedState
from mustdrop.kv.static import PrunedStaticLayer

__all__ = [
    "Arrival",
    "Held",
    "PrunedLayer",
    "PrunedState",
    "PrunedStaticLayer",
    "Slots",
    "Stored",
    "adopt",
    "check",
    "first",
    "hold",
    "inner",
    "is_step",
    "length",
    "release",
    "settle",
    "stored",
]

REFUSED_IMPLEMENTATIONS = "sliding_window and hybrid static caches, quantized, offloaded and paged caches"

_PRUNED: dict[Any, Any] = {
    DynamicLayer: PrunedLayer,
    DynamicSlidingWindowLayer: PrunedLayer,
    StaticLayer: PrunedStaticLayer,
    LinearAttentionLayer: PrunedState,
}


def adopt(cache: Any, text_config: Any, n_layers: int, use_cache: bool, no_static: str | None = None) -> Any:
    """Make every layer of `cache` a `PrunedLayer` or `PrunedStaticLayer`, in place.

    A new, growing cache if there is none and one is wanted.

    Args:
        cache: as it came, or None.
        text_config: configuration of the text model.
        n_layers: decoder layers.
        use_cache: whether the caller wants a cache.
        no_static: see `check`.

    Returns:
        The cache to use, or None.

    Raises:
        UnsupportedOptionError: a cache that cannot be pruned; the message names it.
    """
    if cache is None:
        if not use_cache:
            return None
        cache = dynamic_cache(text_config)
    check(cache, no_static)
    if len(cache.layers) < n_layers:  # those of recurrent layers are of another kind, and there is none for all of them
        usual = dict(enumerate(dynamic_cache(text_config).layers))
        for i in range(len(cache.layers), n_layers):
            linear = isinstance(usual.get(i), LinearAttentionLayer)
            cache.layers.append(PrunedState.adopt(usual[i]) if linear else PrunedLayer())
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, Slots):
            cache.layers[i] = _PRUNED[type(layer)].adopt(layer)
    return cache


def check(cache: Any, no_static: str | None = None) -> None:
    """Refuse what cannot be pruned; nothing is changed.

    Args:
        cache: any cache of transformers.
        no_static: why a static cache is out of the question, None where it is not.

    Raises:
        UnsupportedOptionError: the message names the cache, or the layers in it that are to blame.
        CacheStateError: its layers hold different numbers of tokens.
    """
    if not hasattr(cache, "layers") or getattr(cache, "offloading", False):
        kind = "an offloading cache" if getattr(cache, "offloading", False) else f"a {type(cache).__name__}"
        raise UnsupportedOptionError(
            f"{kind} cannot be pruned; mustdrop refuses {REFUSED_IMPLEMENTATIONS}. Use a DynamicCache or a StaticCache."
        )
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            continue
        if not isinstance(layer, Slots) and type(layer) not in _PRUNED:
            raise UnsupportedOptionError(
                f"the cache holds {type(layer).__name__} layers; mustdrop prunes growing and static caches of full "
                f"attention and refuses {REFUSED_IMPLEMENTATIONS}. "
                "Pass a DynamicCache(config=model.config) or none at all."
            )
        if no_static is not None and isinstance(layer, StaticLayer):
            raise UnsupportedOptionError(f"a static cache cannot be used here: {no_static}")
    lengths = {
        int(layer.get_seq_length())
        for layer in cache.layers
        if getattr(layer, "is_initialized", False) and _counts(layer)
    } - {0}
    if len(lengths) > 1:
        raise CacheStateError(
            f"the layers of this cache hold different numbers of tokens ({sorted(lengths)}): a crop or a pass ended "
            "with an error on the way. Start with a new cache."
        )


def _counts(layer: Any) -> bool:
    """Whether a layer knows its length without asking a device."""
    return not isinstance(layer, StaticLayer | LinearAttentionLayer)


def first(cache: Any) -> Any:
    """The first layer of `cache` that holds entries; recurrent layers hold none."""
    for layer in cache.layers:  # compiled code asks
        if type(layer) is not PrunedState:
            return layer
    return None


def is_step(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a module is called for one more token over a static cache whose layout is fixed, and without media.

    Reads nothing but shapes and attributes, so that compiled code may ask.

    Args:
        args: positional arguments of a top, base or text model.
        kwargs: its keyword arguments.
    """
    cache = cache_of(kwargs)
    entries = first(cache) if getattr(cache, "layers", None) else None
    if type(entries) is not PrunedStaticLayer or not entries.ready:
        return False
    token = kwargs.get("input_ids")
    if token is None:
        token = args[0] if args else kwargs.get("inputs_embeds")
    return token is not None and token.shape[1] == 1


def inner(text_config: Any, n_layers: int) -> Any:
    """A growing cache for a pass of the prompt, of which nothing is noted before the pass has ended (see `hold`)."""
    cache = adopt(None, text_config, n_layers, True)
    for layer in cache.layers:
        if type(layer) is PrunedLayer:
            layer.incoming = True
    return cache


def hold(held: list[tuple[Any, Held]], totals: Any, advance: int) -> None:
    """Empty layers take what a pass over an `inner` cache has left.

    Args:
        held: per layer, what comes to it.
        totals: (B,) long, vision tokens that came, dropped ones included.
        advance: logical tokens that came.
    """
    fixed = []
    for layer, own in held:
        if own.layer.keys is not None or isinstance(layer, PrunedState):
            layer.hold(own, totals, advance)
            fixed += [(layer, own.layer)] if type(layer) is PrunedStaticLayer else []
    if fixed:
        PrunedStaticLayer.write(fixed)


def length(cache: Any, counts: bool) -> int:
    """Logical length of `cache`.

    Of a static cache that holds something the device is asked, once for all layers where the pass that begins `counts`
    the slots: one whose every update comes with an arrival.
    """
    entries = first(cache)
    if not counts or type(entries) is not PrunedStaticLayer:
        return int(cache.get_seq_length())
    for places, counter in _counters(cache.layers):
        for i, number in zip(places, counter.tolist(), strict=True):
            cache.layers[i].filled = number - cache.layers[i].dropped
    return int(entries.logical)


def stored(layers: list[Any]) -> list[Stored]:
    """What each layer stores now. Nothing waits for the device, and no key or value is kept.

    What only the device knows of a static cache is copied there: later steps count in the same place.
    """
    numbers: dict[int, Any] = {}
    for places, counter in _counters(layers):
        numbers |= dict(zip(places, counter.split(1), strict=True))
    found: list[Stored] = []
    for i, layer in enumerate(layers):
        found.append(layer.stored(numbers.get(i, 0), found[-1] if found else None))
    return found


def _counters(layers: list[Any]) -> list[tuple[list[int], Any]]:
    """Per device, which layers there are of a fixed size and filled, and (layers,) long: a copy of their counters."""
    by_device: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        if type(layer) is PrunedStaticLayer and layer.is_initialized:
            by_device.setdefault(layer.keys.device, []).append(i)
    return [(some, torch.stack([layers[i].cumulative_length for i in some])) for some in by_device.values()]


def settle(cache: Any, failed: bool = False, slices: bool = False) -> None:
    """A pass over `cache` has ended: unless it has failed, a static cache is ready for compiled decode steps.

    Args:
        cache: any, or None.
        failed: whether the pass has.
        slices: whether the passes that follow come with masks that hide nothing.
    """
    layers = [layer for layer in getattr(cache, "layers", None) or () if type(layer) is PrunedStaticLayer]
    if not failed:
        PrunedStaticLayer.settle([layer for layer in layers if layer.is_initialized], slices)
    for layer in layers:
        layer.filled, layer.ready = None, layer.ready if failed else True


def release(cache: Any) -> None:
    """The `generate` that a cache belonged to has ended: what comes now may bring any mask.

    A static cache that was prepared for masks which hide nothing is not ready for compiled steps before a pass has
    prepared it for others.
    """
    layers = [layer for layer in getattr(cache, "layers", None) or () if type(layer) is PrunedStaticLayer]
    prepared = not any(layer.sliced for layer in layers)
    for layer in layers:
        layer.sliced, layer.ready = False, layer.ready and prepared
