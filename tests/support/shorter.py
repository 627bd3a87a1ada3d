"""The oracle of models with recurrent layers: the UNPATCHED text model, run on the shorter sequence.

No mask hides a token from a layer that folds all tokens into one state, so this oracle leaves it out: each row of the
batch runs by itself, without its padding and without what was dropped, with the original positions, over a cache of its
own. It knows nothing of how mustdrop works: what was dropped comes from ``mustdrop.trace``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from mustdrop.adapters import find
from mustdrop.compat import cache_of

from .oracle import Hidden


class ShorterOracle:
    """``with ShorterOracle(plain, hidden): plain.generate(...)`` leaves tokens out.

    The cache that ``generate`` hands on only counts; what each row has seen is in a cache of that row. What it holds
    for step 0 is hidden at layer 0, for every layer: nothing is dropped later in such models.
    """

    def __init__(self, model: Any, hidden: Hidden) -> None:
        self.model, self.hidden, self.step = model, hidden, -1
        self.caches: dict[int, tuple[Any, list[Any]]] = {}  # holding a cache keeps its id its own

    def __enter__(self) -> ShorterOracle:
        self.text = find(self.model).text(self.model)
        self.forward = self.text.forward
        object.__setattr__(self.text, "forward", self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        object.__delattr__(self.text, "forward")

    def _forward(self, **kwargs: Any) -> BaseModelOutputWithPast:
        self.step += 1
        embeds, mask, positions = (kwargs.get(name) for name in ("inputs_embeds", "attention_mask", "position_ids"))
        if embeds is None:
            embeds = self.text.get_input_embeddings()(kwargs["input_ids"])
        cache, (rows, length) = cache_of(kwargs), embeds.shape[:2]
        if cache is None and kwargs.get("use_cache"):
            cache = DynamicCache(config=self.text.config)
        start = 0 if cache is None else int(cache.get_seq_length())
        left = ~self._dropped(rows, start, length)
        if mask is not None:
            assert mask.ndim == 2, "the oracle needs the mask that says what is padding"
            left &= mask[:, start : start + length].bool()
        own = self._rows(cache, rows)
        if positions is None:
            positions = torch.arange(start, start + length)[None].expand(rows, -1)
        positions = positions.expand(*positions.shape[:-2], rows, -1)
        full, out = torch.zeros_like(embeds), BaseModelOutputWithPast()
        for b in range(rows):
            if not bool(left[b].any()):
                continue
            n = int(own[b].get_seq_length()) + int(left[b].sum())
            out = self.forward(
                inputs_embeds=embeds[b : b + 1, left[b]],
                position_ids=positions[..., b : b + 1, :][..., left[b]],
                attention_mask=torch.ones(1, n, dtype=torch.long),
                use_cache=True,
                past_key_values=own[b],
            )
            full[b, left[b]] = out.last_hidden_state[0]
        if cache is not None:
            self._count(cache, torch.zeros(rows, 1, length, 1))
            for layer, made in zip(cache.layers, own[0].layers, strict=False):  # says whether drafts can be taken back
                if hasattr(made, "is_conv_states_initialized"):
                    layer.is_conv_states_initialized = made.is_conv_states_initialized
        out.last_hidden_state, out.past_key_values = full, cache  # a mixture of experts says more
        return out

    def _dropped(self, rows: int, start: int, length: int) -> Tensor:
        """(rows, length) bool, tokens of this pass that were dropped."""
        hidden = self.hidden.at(self.step, 0)
        hidden = hidden.repeat_interleave(rows // hidden.shape[0], 0)[:, start : start + length]
        return torch.nn.functional.pad(hidden, (0, length - hidden.shape[1]), value=False)

    def _rows(self, cache: Any, rows: int) -> list[Any]:
        """The caches of the rows that belong to one of ``generate``."""
        fresh = [DynamicCache(config=self.text.config) for _ in range(rows)]
        if cache is None:
            return fresh
        if id(cache) not in self.caches:
            self.caches[id(cache)] = cache, fresh
            if any(getattr(layer, "record_past", False) for layer in cache.layers):
                for own in fresh:
                    own.activate_past_recording()

            def reorder(beam_idx: Tensor) -> None:
                known = self.caches[id(cache)][1]
                self.caches[id(cache)] = cache, [copy.deepcopy(known[i]) for i in beam_idx.tolist()]

            def crop(tokens_to_remove: int) -> None:
                next(layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)).crop(tokens_to_remove)
                for own in self.caches[id(cache)][1]:
                    own.crop(tokens_to_remove)

            cache.reorder_cache, cache.crop = reorder, crop
        return self.caches[id(cache)][1]

    @staticmethod
    def _count(cache: Any, tokens: Tensor) -> None:
        if not cache.layers:
            cache.layers.append(DynamicLayer())
        layer = next(layer for layer in cache.layers if isinstance(layer, CacheLayerMixin))
        layer.update(tokens, tokens)
