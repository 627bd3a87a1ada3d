"""The language-model side: gather rows between decoder layers, map masks, cut the cache, scatter the result back."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mustdrop import kernels, kv
from mustdrop.compat import eager
from mustdrop.errors import MustDropError, UnsupportedOptionError
from mustdrop.pruners.prefill import needs_rows
from mustdrop.runtime import checks, entry, scores
from mustdrop.runtime.compiled import compiled_step, outside_steps
from mustdrop.runtime.entry import Media
from mustdrop.runtime.eviction import evict_dropped
from mustdrop.runtime.masks import visible_keys
from mustdrop.runtime.rewrite import Rewriter, arrival
from mustdrop.runtime.rows import PAD, has_padding, pack, take
from mustdrop.runtime.state import Call, Forward, Local, Prefill

if TYPE_CHECKING:
    from mustdrop.runtime.core import Runtime


@dataclass
class LayerHook:
    """Pre-hook of one decoder layer."""

    stage: TextStage
    index: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `TextStage.before_layer` and, for a compiled decode step, `TextStage.compiled_layer`.

        What comes by position beside the hidden states gets its name.
        """
        if compiled_step(self.stage.local, args, kwargs):
            return self.stage.compiled_layer(self.index, args, kwargs)
        if len(args) > 1:
            names = list(inspect.signature(type(module).forward).parameters)[2:]
            args, kwargs = args[:1], {**dict(zip(names, args[1:], strict=False)), **kwargs}
        return self.stage.before_layer(self.index, args, kwargs)


@dataclass
class AttentionCapture:
    """Capture point of one decoder layer's attention."""

    stage: TextStage
    index: int

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        """See `TextStage.capture`."""
        self.stage.capture(self.index, module, q, k, mask, kwargs)


class TextStage:
    """Runs the prefill and decode sockets of one patched model."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.rewriter = Rewriter(runtime)

    @property
    def local(self) -> Local:
        """Run state of this thread."""
        return self.runtime.local

    # -- entry --------------------------------------------------------------------------------------------------------

    @outside_steps
    def before_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adopt the cache, find the vision tokens of this pass, take the NaN marks out of the embeddings."""
        runtime, local = self.runtime, self.runtime.local
        local.forward, local.capture = None, None
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        kinds, local.kinds = local.kinds, None
        if embeds is None:
            return None
        wants = kwargs.get("use_cache")
        wants = module.config.use_cache if wants is None else wants
        cache = kv.adopt(
            kwargs.get("past_key_values"), module.config, runtime.depth, bool(wants), checks.no_static(runtime)
        )
        if cache is not None:
            kwargs["past_key_values"] = cache
        start = int(cache.get_seq_length()) if cache is not None else 0
        forward = local.forward = Forward(embeds.shape[1], start, embeds.shape[0], cache)
        mask = kwargs.get("attention_mask")
        mask = mask if local.mask is None else local.mask  # the base model may have made 4-D masks of it
        if kinds is None or not bool((kinds >= 0).any()):
            if runtime.method.vision is not None and forward.length > 1 and bool(embeds[..., 0].isnan().any()):
                raise UnsupportedOptionError(
                    "inputs_embeds hold rows of NaN: image features of a patched model, placed by hand. Pass input_ids "
                    "and pixel_values instead, or compute the features while the model is not patched."
                )
            self._evict(forward)
            nothing = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
            self._begin_record(forward, Prefill(nothing, start, entry.valid_tokens(nothing, mask, start)))
            return args, kwargs
        media = forward.media = entry.read(runtime, embeds, kinds, mask)
        self._begin_record(forward, Prefill(media.vision, start, media.valid, marks=media.marks, media=media.media))
        if runtime.method.vision is not None:
            kwargs["inputs_embeds"] = embeds.masked_fill(~media.alive[..., None], 0.0)
        return args, kwargs

    def _begin_record(self, forward: Forward, prefill: Prefill) -> None:
        """The first pass of a call is the one that the trace describes."""
        call = self.runtime.local.call
        if call is None:
            return
        if call.prefill is None:
            call.prefill = forward.record = prefill
        else:
            call.steps += forward.length

    def _evict(self, forward: Forward) -> None:
        """Before a decode step: the least attended vision entries leave if it is time."""
        decode = self.runtime.method.decode
        if decode is None or decode.keep is None or forward.cache is None:
            return
        for layer in forward.cache.layers:
            if layer.attended is None or not decode.due(layer.steps + 1):
                continue
            score = nn.functional.pad(layer.attended, (0, layer.slots - layer.attended.shape[1]))
            layer.evict(decode(score, layer.slot_vision(), decode.counts(layer.totals)).mask(layer.slots))

    # -- layers -------------------------------------------------------------------------------------------------------

    @eager
    def before_layer(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Drop rows if it is this layer's turn, then bring its arguments in line with the rows that are left."""
        forward = self.runtime.local.forward
        if forward is None:
            return None
        layer = forward.cache.layers[i] if forward.cache is not None else None
        if layer is not None:
            layer.prepared = True
        hidden: Tensor = args[0]
        media = forward.media
        if media is None:
            return (args, kwargs) if self._extend(i, layer, forward, hidden, kwargs) else None
        if i == 0 and (media.reordered or not bool(media.alive.all())):
            hidden = self._gather(forward, media, hidden, media.alive)
        elif i - 1 in self.runtime.filters:
            hidden = self._filter(forward, media, self.runtime.filters.index(i - 1), hidden)
        if forward.record is not None:
            forward.record.rows.append(forward.rows)
            forward.record.past.append(layer.slots if layer is not None else 0)
        if i in self.runtime.filters and not scores.skips(media, self.runtime.filters.index(i)):
            self.runtime.local.capture = ("text", i)
        if layer is not None:
            layer.arrival = arrival(forward, media)
            layer.padded |= media.padded if forward.rows is None else forward.padded
        if forward.rows is not None:
            self.rewriter.rewrite(layer, forward, media, hidden, kwargs)
        else:
            self._extend(i, layer, forward, hidden, kwargs)
        return (hidden,), kwargs

    def compiled_layer(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A decode step over a static cache: only the mask is mapped to the slots."""
        layer = kwargs["past_key_values"].layers[i]
        layer.prepared = True
        return (args, kwargs) if self.rewriter.step(layer, args[0], kwargs) else None

    def _filter(self, forward: Forward, media: Media, k: int, hidden: Tensor) -> Tensor:
        attention, forward.attention = forward.attention, None
        prefill = self.runtime.method.prefill
        if scores.skips(media, k) or prefill is None:
            return hidden
        if attention is None:
            raise MustDropError(
                f"decoder layer {self.runtime.filters[k]} ran without its attention being read: its attention module "
                "does not ask its config which function to use."
            )
        vision = forward.current(media.vision)
        selection = scores.choose(self.runtime, prefill, forward, media, hidden, attention, k)
        keep = selection.mask(vision.shape[1]) | ~vision
        reorders = selection.merge_into is not None and self.runtime.method.renumber
        if bool(keep.all()) and not reorders:
            return hidden
        if selection.merge_into is not None:
            hidden = scores.merged(selection.to(hidden.device), hidden)
        order = scores.released_order(selection, vision.shape[1]) if reorders else None
        return self._gather(forward, media, hidden, keep, order)

    def _gather(
        self, forward: Forward, media: Media, hidden: Tensor, keep: Tensor, order: Tensor | None = None
    ) -> Tensor:
        """Keep the rows where `keep`, (B, rows now), is True; the prompt's padding goes at the first gather."""
        if order is None and forward.rows is None:
            order = media.order
        place = pack(keep & forward.current(media.valid), order)
        forward.rows = take(forward.index(place.device), place, 1).masked_fill(place == PAD, PAD)
        forward.padded, forward.memo = has_padding(place), {}
        return kernels.gather_rows([hidden], place.to(hidden.device), zero=forward.padded)[0]

    def _extend(self, i: int, layer: kv.Slots | None, forward: Forward, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """Nothing is dropped in this pass: only a cache that has been pruned before needs its mask mapped."""
        if layer is None or layer.positions is None:
            return False
        if isinstance(layer, kv.PrunedStaticLayer):
            # a whole layer is what transformers takes it for, and gives out all its room
            if layer.whole:
                return False
            if forward.media is None:
                return self.rewriter.step(layer, hidden, kwargs, forward.memo)
        if forward.media is None and self._scores_decode:
            self.runtime.local.capture = ("text", i)
        return self.rewriter.extend(layer, forward, hidden, kwargs)

    # -- scores -------------------------------------------------------------------------------------------------------

    @property
    def _scores_decode(self) -> bool:
        decode = self.runtime.method.decode
        return decode is not None and decode.keep is not None

    @eager
    def capture(
        self, i: int, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        """Attention of the rows that matter: text rows at a filter layer, the new tokens while decoding."""
        forward = self.runtime.local.forward
        if forward is None:
            return
        media = forward.media
        if media is None:
            rows = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
        else:
            rows = scores.rows(self.runtime.method.prefill, forward, media, k, q.shape[2]).to(q.device)
        if forward.cache is not None:  # a static cache hands out room for later tokens too
            stored = forward.cache.layers[i].slots
            k, mask = k[:, :, :stored], mask if mask is None else mask[..., :stored]
        visible, bias = visible_keys(rows, mask, q.shape[2], k.shape[2])
        scaling = kwargs.get("scaling") or getattr(module, "scaling", None) or q.shape[-1] ** -0.5
        arguments = (q, k, rows, visible, scaling, bias, kwargs.get("softcap"))
        if media is None:
            probability = (kernels.row_probabilities if len(rows[0]) == 1 else kernels.text_statistics)(*arguments)
            forward.cache.layers[i].accumulate(probability[:, 0])
            return
        prefill = self.runtime.method.prefill
        score = kernels.row_probabilities if needs_rows(prefill) else kernels.text_statistics
        forward.attention = score(*arguments, first=k.shape[2] - q.shape[2])
        if forward.record is not None:
            forward.record.raters = max(forward.record.raters, rows.shape[1])
            forward.record.scored.append(i)

    # -- exit ---------------------------------------------------------------------------------------------------------

    @outside_steps
    def after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Scatter the hidden states back to the logical length; cut the earlier layers' caches."""
        local = self.runtime.local
        forward, local.forward, local.capture = local.forward, None, None
        if forward is None or output is None:
            return None
        call = local.call
        if call is not None:
            call.cache = forward.cache
        made = self._leave(forward, call, output)
        if forward.cache is not None:
            for layer in forward.cache.layers:
                layer.slide()
        return made

    def _leave(self, forward: Forward, call: Call | None, output: Any) -> Any:
        """Scatter and cut after a pass in which something was dropped; None if nothing was."""
        if forward.media is None:
            return None
        if forward.record is not None:
            forward.record.rows.append(forward.rows)
        if forward.rows is None:
            if forward.cache is not None and not self._scores_decode:
                for layer in forward.cache.layers:
                    layer.forget_if_whole()
            return None
        rows = forward.rows.to(output.last_hidden_state.device)
        target = rows.masked_fill(rows == PAD, forward.length)  # padding goes to one row too many, cut off below
        here = torch.zeros(forward.batch, forward.length + 1, dtype=torch.bool, device=rows.device)
        here = here.scatter(1, target, True)[:, :-1]
        decode = self.runtime.method.decode
        if forward.cache is not None and decode is not None and decode.cascade:
            evict_dropped(forward.cache.layers[decode.full_layers :], forward.start, here)
        if call is not None and call.labels is not None:
            # a dropped token predicts nothing: its successor leaves the loss (the labels are our own copy)
            call.labels[:, 1:].masked_fill_(~here[:, :-1].to(call.labels.device), -100)
        hidden = output.last_hidden_state
        full = hidden.new_zeros(hidden.shape[0], forward.length + 1, hidden.shape[2])
        output.last_hidden_state = full.scatter(1, target[..., None].expand_as(hidden), hidden)[:, :-1]
        return output
