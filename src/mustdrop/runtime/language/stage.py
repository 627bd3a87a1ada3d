"""Where a pass of the language model begins and ends: what enters, logical length again, the caches cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mustdrop import kv
from mustdrop.compat import cache_of, give_cache, spans
from mustdrop.constants import where
from mustdrop.errors import UnsupportedOptionError
from mustdrop.indices import HOST, PAD, on
from mustdrop.kv.cut import evict_dropped
from mustdrop.pruners import DecodeCachePruner
from mustdrop.runtime import guards
from mustdrop.runtime.calls import TEXT, raised
from mustdrop.runtime.compile import engine
from mustdrop.runtime.compile.decode_steps import outside_steps
from mustdrop.runtime.copied import Copied
from mustdrop.runtime.language import cache_policy, filter_step, fixed_rows, text_rows, vision_tokens
from mustdrop.runtime.language.decoder_layers import DecoderLayers
from mustdrop.runtime.language.later_tokens import LaterTokens
from mustdrop.runtime.language.vision_tokens import VisionTokens
from mustdrop.runtime.records import Prefill
from mustdrop.runtime.state import Call, Forward

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime

_NO_DECODE = DecodeCachePruner(cascade=False)  # a socket that is empty


class TextStage(Copied):
    """Runs the prefill and decode sockets of one patched model, with what `DecoderLayers` does in between."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.local = runtime, runtime.local
        self._decode = runtime.method.decode or _NO_DECODE
        self.spans = spans(runtime.text.config, runtime.depth)
        self.layers = DecoderLayers(runtime, self._decode, self.spans)

    # -- entry --------------------------------------------------------------------------------------------------------

    def before_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `_before_text`; where the text model is compiled and the pass is straight, what is left of that."""
        straight = self.local.straight
        if straight is None or args or not torch.compiler.is_compiling():
            return self._before_text(module, args, kwargs)
        kwargs = {**kwargs, "inputs_embeds": straight.arrive(kwargs["inputs_embeds"])}
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = straight.columns(kwargs["attention_mask"])
        if straight.inner is not None:
            give_cache(kwargs, straight.inner, self.runtime.cache_name)
        return (), kwargs

    def ahead(self) -> None:
        """Make the pass that is coming ready, where the text model is compiled: its hooks must not do that then."""
        runtime, local = self.runtime, self.local
        coming, kinds, call = local.coming, local.kinds, local.call
        local.straight = local.forward = None
        if coming is None or kinds is None or call is None or not self._has_vision(kinds):
            return
        wants = coming.get("use_cache")
        wants = self.runtime.text.config.use_cache if wants is None else wants
        cache = kv.adopt(cache_of(coming), runtime.text.config, runtime.depth, bool(wants), guards.no_static(runtime))
        begins = self._begins(cache, kinds.shape[1], True)
        forward = Forward(kinds.shape[1], begins, kinds.shape[0], cache, mask=local.mask, flash=runtime.flash)
        local.forward = forward
        guards.windows(runtime, self.spans, forward)
        media = vision_tokens.counted(runtime, next(runtime.text.parameters()).device, kinds, local.mask)
        local.straight = engine.ready(runtime, forward, media)
        if local.straight is None:
            local.forward = None
            return
        forward.media = media

    def behind(self, output: Any) -> None:
        """The base model is done: note what a compiled straight pass has left."""
        local = self.local
        straight, forward, call = local.straight, local.forward, local.call
        if straight is None or forward is None or not straight.left:
            return
        if self._is_recorded(forward):
            self._record_media(forward)
        if call is not None:
            call.cache = forward.cache
        engine.landed(self.runtime, straight, forward, output)
        local.forward = None
        for layer in [] if forward.cache is None else forward.cache.layers:
            layer.slide()

    @outside_steps
    def _before_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adopt the cache, find the vision tokens of this pass, take the NaN marks out of the embeddings."""
        runtime, local = self.runtime, self.runtime.local
        kwargs = runtime.calls.enter(TEXT, module, args, kwargs)
        kwargs.pop("shift_labels", None)  # of the head; some models hand it down to their layers
        local.forward, local.capture, local.straight = None, None, None
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        kinds, local.kinds = local.kinds, None
        tokens: Tensor | None = kwargs.get("input_ids") if embeds is None else embeds
        if tokens is None:
            return (), kwargs
        wants = kwargs.get("use_cache")
        wants = module.config.use_cache if wants is None else wants
        cache = kv.adopt(cache_of(kwargs), module.config, runtime.depth, bool(wants), guards.no_static(runtime))
        if cache is not None:
            give_cache(kwargs, cache, runtime.cache_name)
        seen = embeds is not None and kinds is not None and self._has_vision(kinds)
        begins = self._begins(cache, tokens.shape[1], seen)
        forward = local.forward = Forward(tokens.shape[1], begins, tokens.shape[0], cache, flash=runtime.flash)
        mask = kwargs.get("attention_mask")
        mask = mask if local.mask is None else local.mask  # the base model may have made 4-D masks of it
        forward.mask = mask
        guards.windows(runtime, self.spans, forward)
        if embeds is None or kinds is None or not seen:
            marked = embeds is not None and runtime.method.marks and forward.length > 1
            if marked and bool(cast(Tensor, embeds)[..., 0].isnan().any()):
                raise UnsupportedOptionError(
                    "inputs_embeds hold rows of NaN: image features of a patched model, placed by hand. Pass input_ids "
                    "and pixel_values instead, or compute the features while the model is not patched."
                )
            if self._decode.reads_steps:
                cache_policy.before_step(
                    self._decode, forward.cache, LaterTokens.of(self.spans, forward, self.local.call)
                )
            forward.idle = self._idle(forward)
            if self._is_recorded(forward):
                nothing = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=HOST)
                valid = text_rows.valid_tokens(nothing, mask, forward.start)
                self._record(forward, Prefill(nothing, forward.start, valid))
            return (), kwargs
        media = forward.media = vision_tokens.read(runtime, embeds, kinds, mask)
        if self._decode.old_pictures is not None:
            from mustdrop.runtime.language import old_pictures

            media.pictures, forward.shrinks = old_pictures.numbers(media), old_pictures.due(self._decode, cache, media)
        if self._is_recorded(forward):
            self._record_media(forward)
        if runtime.engine is not None:
            local.straight = engine.ready(runtime, forward, media)
            if local.straight is not None:
                return (), kwargs
        scorer = fixed_rows.names_raters(runtime.method.prefill)
        if scorer is not None and media.fixed is not None:
            media.fixed.ask_raters(scorer, embeds)
        if not media.whole:
            stay = media.alive if media.fixed is None else media.fixed.arrive()
            kwargs["inputs_embeds"] = where(on(stay, embeds.device)[..., None], embeds, 0.0)
        forward.lent = self._lent(media)
        forward.idle = self._keeps_all(forward, media)
        if forward.idle and forward.record is not None:
            forward.record.rows, forward.record.past = [None] * runtime.depth, [forward.start] * runtime.depth
        return (), kwargs

    def _record_media(self, forward: Forward) -> None:
        """For the trace: which media came."""
        media = forward.media
        assert media is not None, "a pass without media"
        self._record(forward, Prefill(media.places, forward.start, media.valid, own=media.marks, shown=media.shown))

    def _has_vision(self, kinds: Tensor) -> bool:
        """Whether any of the positions is a vision token's."""
        call = self.local.call
        if call is not None and call.looked is not None and call.looked.kinds is kinds:
            return any(map(any, call.totals_of.values()))
        return bool((kinds.numpy() >= 0).any())

    def _begins(self, cache: Any, length: int, seen: bool) -> Callable[[], int]:
        """What says how many tokens came before this pass.

        It is asked at once, but for a step over a static cache: there the device would have to say it, and nothing
        needs it.
        """
        if cache is None:
            return lambda: 0
        first = kv.first(cache)
        step = length == 1 and not seen and type(first) is kv.PrunedStaticLayer and first.ready
        if step and not self._decode.reads_steps:
            return lambda: kv.length(cache, counts=False)
        start = kv.length(cache, counts=seen)
        return lambda: start

    def _idle(self, forward: Forward) -> bool:
        """See `Forward.idle`. The layers' hooks do next to nothing then, so the cache is told here that they ran."""
        if forward.length > 1 or forward.flash or self.runtime.method.renumber or self._decode.reads_steps:
            return False
        layers = [] if forward.cache is None else forward.cache.layers
        forward.free = all(layer.plain for layer in layers)
        if forward.free:
            return True
        if not all(isinstance(layer, kv.PrunedLayer | kv.PrunedState) for layer in layers):
            return False
        for layer in layers:
            layer.prepared = True
        return True

    def _keeps_all(self, forward: Forward, media: VisionTokens) -> bool:
        """Whether it is certain before the first layer that all tokens stay, in their order, and no layer is read."""
        reads = self._decode.reads_prompt or self._decode.reads_steps or media.pictures is not None
        if reads or media.reordered or not media.whole:
            return False
        if not all(filter_step.skips(media, k) for k in range(len(self.runtime.filters))):
            return False
        layers = [] if forward.cache is None else forward.cache.layers
        forward.free = all(layer.plain for layer in layers)
        return forward.free or all(
            isinstance(layer, kv.PrunedLayer | kv.PrunedState) and layer._positions is None for layer in layers
        )

    def _lent(self, media: VisionTokens) -> range:
        """Layers whose caches are sure to be cut when the pass has ended, or nearly: see `Forward.lent`."""
        decode, depth = self._decode, self.runtime.depth
        if decode.after_prefill:
            return range(depth if decode.cuts(media.totals) else 0)
        if not decode.cascade:
            return range(0)
        drops = [layer for k, layer in enumerate(self.runtime.filters) if not filter_step.skips(media, k)]
        return range(decode.full_layers, max(drops, default=-1) + 1)

    def _is_recorded(self, forward: Forward) -> bool:
        """Whether the trace describes this pass, the first of its call. Of others only the tokens are counted."""
        call = self.runtime.local.call
        if call is not None and call.prefill is not None:
            call.steps += forward.length
        return call is not None and call.prefill is None

    def _record(self, forward: Forward, prefill: Prefill) -> None:
        call = self.runtime.local.call
        assert call is not None  # as `_is_recorded` has found
        call.prefill = forward.record = prefill

    # -- exit ---------------------------------------------------------------------------------------------------------

    def after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """See `_after_text`; of a straight pass in a compiled text model, what belongs to the graph."""
        straight = self.local.straight
        if straight is None or output is None or not torch.compiler.is_compiling():
            return self._after_text(module, args, kwargs, output)
        output.last_hidden_state = straight.leave(output.last_hidden_state)
        return output

    @outside_steps
    def _after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Scatter the hidden states back to the logical length; cut the earlier layers' caches."""
        local = self.runtime.local
        if local.levels[-1:] != (TEXT,):  # it was never entered
            return None
        forward, call, made = local.forward, local.call, None
        local.forward, local.capture, local.straight = None, None, None
        cache = None if forward is None else forward.cache
        if forward is not None and output is not None:
            if call is not None:
                call.cache = forward.cache
            made = self._leave(forward, call, output)
            if cache is not None and not forward.free:
                for layer in cache.layers:
                    layer.slide()
        if forward is not None and cache is not None:
            for layer in cache.layers[forward.lent.start : forward.lent.stop]:
                layer.own()
        self.runtime.calls.leave(TEXT, kwargs, raised(output))
        return made

    def _leave(self, forward: Forward, call: Call | None, output: Any) -> Any:
        """Scatter and cut after a pass with vision tokens; None if the output is as it was."""
        if forward.media is None or forward.landed:
            return None
        if forward.record is not None:
            forward.record.rows.append(forward.rows)
        later = LaterTokens.of(self.spans, forward, self.local.call) if self._decode.after_prefill else None
        if later is not None and (forward.rows is not None or forward.shrinks):
            # what was read goes with the entries that are cut now
            cache_policy.settle(self._decode, forward, later)
        made = None if forward.rows is None else self._scatter(forward, forward.rows, call, output)
        if forward.shrinks:
            from mustdrop.runtime.language import old_pictures

            old_pictures.shrink(self._decode, forward, LaterTokens.of(self.spans, forward, self.local.call))
        if later is not None:
            cache_policy.after_prompt(self._decode, forward, later)
        remembers = self._decode.reads_steps or self._decode.old_pictures is not None
        layers = [] if forward.cache is None or remembers else forward.cache.layers
        # all or none: a model without hooks is then refused at its first layer
        if made is None and not forward.free and all(layer.whole for layer in layers):
            for layer in layers:
                layer.forget()
        return made

    def _scatter(self, forward: Forward, rows: Tensor, call: Call | None, output: Any) -> Any:
        """Hidden states at the logical length again; caches cut to what the last layer processed."""
        # padding goes to one row too many, cut off below
        spare = int(forward.padded)
        target = rows.masked_fill(rows == PAD, forward.length) if spare else rows
        fixed = None if forward.media is None else forward.media.fixed
        evicts = forward.cache is not None and self._decode.cascade
        if fixed is not None and evicts:
            fixed.evict(forward.cache.layers[self._decode.full_layers : self.runtime.depth], self._decode.full_layers)
        if (evicts and fixed is None) or (call is not None and call.labels):
            here = torch.zeros(forward.batch, forward.length + spare, dtype=torch.bool, device=rows.device)
            here = here.scatter(1, target, True)[:, : forward.length]
            if evicts and fixed is None:
                evict_dropped(forward.cache.layers[self._decode.full_layers :], forward.start, here)
            if call is not None:
                call.out_of_the_loss(~here)
        hidden = output.last_hidden_state
        full = hidden.new_zeros(hidden.shape[0], forward.length + spare, hidden.shape[2])
        place = on(target, hidden.device)[..., None].expand_as(hidden)
        output.last_hidden_state = full.scatter(1, place, hidden)[:, : forward.length]
        return output
