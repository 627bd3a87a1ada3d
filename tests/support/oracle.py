"""The masked oracle: an UNPATCHED model that is made to hide tokens.

Dropping a token from decoder layer l on must equal hiding its key and value from every query in the layers >= l, with
the original position ids and a cache of full length. The oracle knows nothing of how mustdrop works: what was dropped
comes from ``mustdrop.trace`` and, for entries that leave the cache while decoding, from the stored keys themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mustdrop.adapters import find
from mustdrop.compat import cache_of

from .builders import vision_positions


@dataclass
class Hidden:
    """Which sequence positions are hidden, for every decoder layer, row and step (step 0 is the prefill).

    ``prefill`` and ``decode`` are bool (L, B, S); ``steps`` overrides single decode steps. ``beams`` says, for a step
    whose rows were reordered, which row of the prompt each row goes on with (B,).
    """

    prefill: Tensor
    decode: Tensor
    steps: dict[int, Tensor] = field(default_factory=dict)
    beams: dict[int, Tensor] = field(default_factory=dict)

    def at(self, step: int, layer: int) -> Tensor:
        """(B, S) True = hidden."""
        return self.prefill[layer] if step == 0 else self.of(step)[layer]

    def of(self, step: int) -> Tensor:
        """(L, B, S) True = hidden at a decode step."""
        if step in self.steps:
            return self.steps[step]
        return self.decode[:, self.beams[step]] if step in self.beams else self.decode

    @property
    def anything(self) -> bool:
        return bool(self.prefill.any() or self.decode.any() or any(step.any() for step in self.steps.values()))


def hidden_by(trace: Any, ids: Tensor, n_layers: int, *, cascade_from: int | None = None) -> Hidden:
    """What a trace says was dropped, as positions in ``ids`` (B, S).

    ``cascade_from`` is ``DecodeCachePruner.full_layers`` when the cascade is on: from that layer on the cache holds,
    after the prefill, only what is alive after the last layer.
    """
    prefill = torch.zeros(n_layers, *ids.shape, dtype=torch.bool)
    decode = prefill.clone()
    for row in range(ids.shape[0]):
        where = vision_positions(ids, row)
        for layer in range(n_layers):
            cached = n_layers if cascade_from is not None and layer >= cascade_from else layer
            prefill[layer, row, _gone(where, trace.kept(layer, row))] = True
            decode[layer, row, _gone(where, trace.kept(cached, row))] = True
    return Hidden(prefill, decode)


def _gone(where: Tensor, kept: Tensor) -> Tensor:
    gone = torch.ones(len(where), dtype=torch.bool)
    gone[kept] = False
    return where[gone]


class MaskedOracle:
    """``with MaskedOracle(plain, hidden): plain.generate(...)`` hides tokens; leaving the block takes the hooks out.

    ``features`` (images, N, D), when given, replaces what the projector returns: a merged token then sits in the rows
    of all its members, and all of them but its representative must be hidden from layer 0 on.
    """

    def __init__(self, model: Any, hidden: Hidden, features: Tensor | None = None) -> None:
        self.model = model
        self.hidden = hidden
        self.features = features
        self.step = -1
        self.prompt_keys: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> MaskedOracle:
        text = find(self.model).text(self.model)
        if text.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError("the oracle needs 4-D masks: use an eager or sdpa model")
        self._handles.append(text.register_forward_pre_hook(self._next_step))
        for i, layer in enumerate(text.layers):
            self._handles.append(layer.register_forward_pre_hook(self._hide(i), with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._remember_keys(i), with_kwargs=True))
        if self.features is not None:
            self._handles.append(self.model.model.multi_modal_projector.register_forward_hook(self._replace_features))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _next_step(self, *_: object) -> None:
        self.step += 1

    def _hide(self, i: int) -> Callable[..., Any]:
        def hook(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
            kwargs["attention_mask"] = self._mask(i, args[0], kwargs)
            return args, kwargs

        return hook

    def _mask(self, i: int, states: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        hidden = self.hidden.at(self.step, i)
        given = kwargs.get("attention_mask")
        if not bool(hidden.any()):
            return given
        rows, queries = states.shape[:2]
        cache = cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length(i))
        keys = past + queries
        if given is None:
            seen = torch.arange(keys)[None] <= torch.arange(past, keys)[:, None]
            seen = seen[None, None].expand(rows, 1, queries, keys)
        else:
            seen = given if given.dtype == torch.bool else given == 0
            seen = seen.expand(rows, 1, queries, seen.shape[-1])
        hidden = hidden.repeat_interleave(rows // hidden.shape[0], 0)[:, : seen.shape[-1]]
        hide = torch.zeros(rows, seen.shape[-1], dtype=torch.bool)
        hide[:, : hidden.shape[1]] = hidden
        least = torch.finfo(states.dtype).min
        return torch.zeros(seen.shape, dtype=states.dtype).masked_fill(~seen | hide[:, None, None], least)

    def _remember_keys(self, i: int) -> Callable[..., None]:
        def hook(_: object, args: object, kwargs: dict[str, Any], out: object) -> None:
            cache = cache_of(kwargs)
            if self.step == 0 and cache is not None:
                self.prompt_keys[i] = cache.layers[i].keys.clone()

        return hook

    def _replace_features(self, _: object, args: object, out: Tensor) -> Tensor:
        times = len(out) // len(self.features)  # up to 5.17 beams repeat the pixels, from 5.18 on the features
        return self.features.repeat_interleave(times, 0).to(out.dtype)


class Beams:
    """Which row of the prompt every row goes on with, per decode step: the reorderings of a cache, composed."""

    def __enter__(self) -> dict[int, Tensor]:
        self.rows: dict[int, Tensor] = {}
        self.plain = Cache.reorder_cache

        def recorded(cache: Any, beam_idx: Tensor) -> None:
            step = len(self.rows)
            self.rows[step + 1] = self.rows[step][beam_idx] if step else beam_idx.clone()
            self.plain(cache, beam_idx)

        Cache.reorder_cache = recorded
        return self.rows

    def __exit__(self, *_: object) -> None:
        Cache.reorder_cache = self.plain


class CacheWatch:
    """Records the keys that every decoder layer of a model attends to, at every step (0 = prefill)."""

    def __init__(self, model: Any) -> None:
        self.keys: list[dict[int, Tensor]] = []
        text = find(model).text(model)
        self._handles = [text.register_forward_pre_hook(lambda *_: self.keys.append({}))]
        for i, layer in enumerate(text.layers):
            self._handles.append(layer.register_forward_hook(self._record(i), with_kwargs=True))

    def __enter__(self) -> CacheWatch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, i: int) -> Callable[..., None]:
        def hook(_: object, args: object, kwargs: dict[str, Any], out: object) -> None:
            keys = None if cache_of(kwargs) is None else cache_of(kwargs).layers[i].keys
            if keys is not None:  # recurrent layers have none
                self.keys[-1][i] = keys.clone()

        return hook

    def hidden_while_decoding(
        self, prompt_keys: dict[int, Tensor], ids: Tensor, base: Hidden, where: Callable[..., Tensor] = vision_positions
    ) -> Hidden:
        """Which vision positions of ``ids`` (B, S) each layer no longer holds at each decode step.

        ``prompt_keys[layer]`` (B, G, S, D) are the oracle's keys of the prompt: a stored key is the one it equals.
        """
        steps = {}
        for step, layers in enumerate(self.keys[1:], start=1):
            rows = base.beams.get(step, torch.arange(len(ids)))
            keys = {layer: of_all[rows] for layer, of_all in prompt_keys.items()}
            steps[step] = self.hidden_at(layers, keys, ids[rows], Hidden(base.prefill, base.of(step)), where)
        return Hidden(base.prefill, base.decode, steps, base.beams)

    @staticmethod
    def hidden_at(
        layers: dict[int, Tensor],
        prompt_keys: dict[int, Tensor],
        ids: Tensor,
        base: Hidden,
        positions: Callable[..., Tensor] = vision_positions,
    ) -> Tensor:
        """(L, B, S) what one step did not hold, on top of what ``base`` hides while decoding."""
        hidden = base.decode.clone()
        for layer, stored in layers.items():
            for row in range(ids.shape[0]):
                where = positions(ids, row)
                held = _held(stored[row], prompt_keys[layer][row][:, where])
                hidden[layer, row, where[~held]] = True
        return hidden


def _held(stored: Tensor, prompt: Tensor) -> Tensor:
    """stored (G, n, D), prompt (G, N, D) -> (N,) whether each prompt key is among the stored ones, up to rounding."""
    tolerance = max(1e-4, 32 * torch.finfo(stored.dtype).eps)
    a, b = stored.transpose(0, 1).flatten(1), prompt.transpose(0, 1).flatten(1)
    if not len(b):
        return torch.zeros(0, dtype=torch.bool)
    return (b[:, None] - a[None]).abs().amax(-1).lt(tolerance).any(1)
