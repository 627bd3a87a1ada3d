"""Before and inside each decoder layer of a prompt's pass: rows leave, arguments follow them, attention is read."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mustdrop import kernels, kv
from mustdrop.compat import Span, cache_of, eager
from mustdrop.errors import MustDropError
from mustdrop.indices import HOST, PAD, Sent, has_padding, on, pack, take
from mustdrop.pruners import DecodeCachePruner
from mustdrop.pruners.prefill import needs_rows
from mustdrop.runtime.compile.decode_steps import compiled_step
from mustdrop.runtime.copied import Copied
from mustdrop.runtime.language import cache_policy, filter_step, text_rows
from mustdrop.runtime.language.attention_call import AttentionCall
from mustdrop.runtime.language.fixed_rows import FixedRows
from mustdrop.runtime.language.later_tokens import LaterTokens
from mustdrop.runtime.language.layer_arguments import LayerArguments, arrival
from mustdrop.runtime.language.vision_tokens import VisionTokens
from mustdrop.runtime.masks_flex import Mask
from mustdrop.runtime.state import Forward

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime


@dataclass
class LayerHook:
    """Pre-hook of one decoder layer."""

    layers: DecoderLayers
    index: int
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, layers: DecoderLayers, index: int, layer: nn.Module) -> LayerHook:
        """The hook of decoder layer `index`, with the names of its arguments after the hidden states."""
        return cls(layers, index, tuple(inspect.signature(type(layer).forward).parameters)[2:])

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `DecoderLayers.before_layer` and, for a compiled decode step, `DecoderLayers.compiled_layer`.

        What comes by position beside the hidden states gets its name.
        """
        local = self.layers.local
        straight = local.straight
        if straight is not None:
            named = dict(zip(self.names, args[1:], strict=False))
            return straight.before_layer(self.index, args[0], {**named, **kwargs})
        if torch.compiler.is_compiling() and compiled_step(local, args, kwargs):
            return self.layers.compiled_layer(self.index, args, kwargs)
        forward = local.forward
        if forward is not None and forward.idle:
            return None if forward.free else self.layers.idle_layer(self.index, forward, args, kwargs)
        if len(args) > 1:
            args, kwargs = args[:1], {**dict(zip(self.names, args[1:], strict=False)), **kwargs}
        return self.layers.before_layer(self.index, args, kwargs)


class DecoderLayers(Copied):
    """What is done before each decoder layer of one patched model, and in the attention of those that are read."""

    def __init__(self, runtime: Runtime, decode: DecodeCachePruner, spans: list[Span | None]) -> None:
        self.runtime, self.local = runtime, runtime.local
        self._decode, self._spans = decode, spans
        self._turns = {layer: k for k, layer in enumerate(runtime.filters)}  # filter layer -> number of the filter
        self._arguments = LayerArguments(runtime)

    @eager
    def before_layer(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Drop rows if it is this layer's turn, then bring its arguments in line with the rows that are left."""
        forward = self.local.forward
        if forward is None:
            return None
        layer = forward.cache.layers[i] if forward.cache is not None else None
        if layer is not None:
            layer.prepared = True
        hidden: Tensor = args[0]
        media = forward.media
        if media is None:
            return (args, kwargs) if self._extend(i, layer, forward, hidden, kwargs) else None
        if i == 0 and media.fixed is not None and not media.whole:
            hidden = self._taken(forward, media.fixed, media.fixed.enter(hidden))
        elif i == 0 and (media.reordered or not media.whole):
            hidden = self._gather(forward, media, hidden, media.alive)
        elif i - 1 in self._turns:
            hidden = self._filter(forward, media, self._turns[i - 1], hidden)
        if forward.record is not None:
            forward.record.rows.append(forward.rows)
            forward.record.past.append(layer.slots if layer is not None and forward.start else 0)
        if self._filters_after(i, media) or (layer is not None and self._reads_prompt(forward)):
            self.local.capture = ("text", i)
        if layer is not None:
            layer.lends = self._lends(i, layer, forward, kwargs)
            layer.arrival = arrival(forward, media)
            layer.padded |= media.padded if forward.rows is None else forward.padded
        if forward.rows is not None:
            self._arguments.rewrite(layer, forward, media, hidden, kwargs, i in self.runtime.recurrent)
        else:
            self._extend(i, layer, forward, hidden, kwargs)
        return (hidden,), kwargs

    @staticmethod
    def _lends(i: int, layer: kv.Slots, forward: Forward, kwargs: dict[str, Any]) -> bool:
        """Whether a layer may hold what comes without a copy. A static one that is whole hands out no room then."""
        if layer.lends:  # since an interrupt ended the pass that should have cut it
            layer.own()
        if forward.start or i not in forward.lent:
            return False
        if not isinstance(layer, kv.PrunedLayer | kv.PrunedStaticLayer) or layer.is_initialized:
            return False
        if isinstance(layer, kv.PrunedStaticLayer) and forward.rows is None:
            mask = kwargs.get("attention_mask")
            if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 4):
                return False
            kwargs["attention_mask"] = None if mask is None else mask[..., : forward.length]
        return True

    def idle_layer(self, i: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A decode step in which only the mask may have to be mapped; layers with the same entries map it once."""
        layer = None if forward.cache is None else forward.cache.layers[i]
        mask = kwargs.get("attention_mask")
        if layer is None or layer.takes(mask, forward.length) or (mask is None and not layer.padded):
            return None
        key = ("step", id(mask), layer.layout_key, layer.shown(forward.length))
        if key not in forward.memo:
            self._arguments.extend(layer, forward, args[0], kwargs)
            forward.memo[key] = (mask, kwargs["attention_mask"])
        kwargs["attention_mask"] = forward.memo[key][1]
        return args, kwargs

    def compiled_layer(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A decode step over a static cache: only the mask is mapped to the slots."""
        layer = cache_of(kwargs).layers[i]
        layer.prepared = True
        return (args, kwargs) if self._arguments.step(layer, args[0], kwargs) else None

    def _filter(self, forward: Forward, media: VisionTokens, k: int, hidden: Tensor) -> Tensor:
        attention, forward.attention = forward.attention, None
        prefill = self.runtime.method.prefill
        if filter_step.skips(media, k) or prefill is None:
            return hidden
        if attention is None:
            raise MustDropError(
                f"decoder layer {self.runtime.filters[k]} ran without its attention being read: its attention module "
                "does not ask its config which function to use."
            )
        if forward.record is not None:
            forward.record.hear(self.runtime.filters[k], attention, forward.rows)
        if media.fixed is not None and media.counts is not None:
            rows, wanted = media.fixed, media.counts[k]
            index, left, hidden = filter_step.kept(
                self.runtime, prefill, forward, media, rows, hidden, attention, wanted
            )
            return self._taken(forward, rows, rows.take(index, left, self.runtime.filters[k] + 1, hidden))
        vision = forward.current(media.vision)
        selection = filter_step.choose(self.runtime, prefill, forward, media, hidden, attention, k)
        keep = selection.mask(vision.shape[1]).to(HOST) | ~vision
        reorders = selection.merge_into is not None and self.runtime.method.reorder
        if bool(keep.all()) and not reorders:
            return hidden
        if selection.merge_into is not None:
            hidden = filter_step.merged(selection, hidden)
        order = filter_step.released_order(selection.to(HOST), vision.shape[1]) if reorders else None
        return self._gather(forward, media, hidden, keep, order)

    @staticmethod
    def _taken(forward: Forward, rows: FixedRows, hidden: Tensor) -> Tensor:
        """Hidden states of the rows that a choice on the device has left."""
        forward.rows, forward.padded, forward.memo = rows.rows, rows.padded, {}
        return hidden

    def _gather(
        self, forward: Forward, media: VisionTokens, hidden: Tensor, keep: Tensor, order: Tensor | None = None
    ) -> Tensor:
        """Keep the rows where `keep`, (B, rows now), is True; the prompt's padding goes at the first gather."""
        if order is None and forward.rows is None:
            order = media.order
        place = pack(keep & forward.current(media.valid), order)
        padded = has_padding(place)
        rows = take(forward.index, place, 1, padded)
        forward.rows, forward.padded, forward.memo = rows.masked_fill(place == PAD, PAD) if padded else rows, padded, {}
        return kernels.gather_rows([hidden], on(place, hidden.device), zero=forward.padded)[0]

    def _extend(self, i: int, layer: kv.Slots | None, forward: Forward, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
        """Nothing is dropped in this pass: only a cache that has been pruned before needs its mask mapped."""
        if layer is None or layer.takes(kwargs.get("attention_mask"), forward.length):
            return False
        if isinstance(layer, kv.PrunedStaticLayer):
            # a whole layer is what transformers takes it for, and gives out all its room
            if layer.whole:
                return False
            if forward.media is None:
                return self._arguments.step(layer, hidden, kwargs, forward.memo)
        if forward.media is None and self._decode.reads_steps:
            self.local.capture = ("text", i)
        return self._arguments.extend(layer, forward, hidden, kwargs)

    # -- scores -------------------------------------------------------------------------------------------------------

    def _reads_prompt(self, forward: Forward) -> bool:
        """Whether rows of the prompt are read in every layer, for the cache."""
        return self._decode.reads_prompt or forward.shrinks

    def _filters_after(self, i: int, media: VisionTokens) -> bool:
        return i in self._turns and not filter_step.skips(media, self._turns[i])

    @eager
    def capture(self, i: int, module: nn.Module, q: Tensor, k: Tensor, mask: Mask, kwargs: dict[str, Any]) -> None:
        """Attention of the rows that matter: text rows at a filter layer, what the cache policy asks for in each."""
        forward = self.local.forward
        if forward is None:
            return
        media, decode = forward.media, self._decode
        layer = None if forward.cache is None else forward.cache.layers[i]
        asked = AttentionCall.of(module, q, k, mask, kwargs, None if layer is None else layer.slots)
        if media is None:
            tokens = torch.empty(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
            cache_policy.read_step(
                decode.scorer, layer, asked, text_rows.valid_tokens(tokens, forward.mask, forward.start)
            )
            return
        if self._filters_after(i, media):
            prefill = self.runtime.method.prefill
            rows = on(filter_step.rows(prefill, forward, media, asked), q.device)
            first = asked.k.shape[2] - q.shape[2]
            fixed = media.fixed
            if fixed is not None and not first and asked.mask is None:
                seen = fixed.seen_by_scorers(q.device)
                asked = replace(asked, seen=None if seen is None else seen[:, seen.shape[1] - rows.shape[1] :])
            if needs_rows(prefill):
                forward.attention = asked.probabilities(rows, first)
            elif fixed is not None:
                forward.attention = Sent(asked.statistics(rows, first))
            else:  # the host decides while the device runs the rest of this layer
                forward.attention = Sent.off(asked.statistics(rows, first))
            self._note(forward, i, rows)
        if layer is not None and self._reads_prompt(forward):
            later = LaterTokens.of(self._spans, forward, self.local.call)
            reader = decode
            if not decode.reads_prompt:
                from mustdrop.runtime.language import old_pictures

                reader = old_pictures.reader(decode)
            self._note(forward, i, cache_policy.read_prompt(reader, i, layer, forward, media, asked, later))

    @staticmethod
    def _note(forward: Forward, i: int, rows: Tensor) -> None:
        """For the trace: so many rows were read in layer `i`."""
        if forward.record is not None:
            forward.record.scored.append((i, rows.shape[1]))
