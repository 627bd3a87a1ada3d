"""The language-model side: gather rows between decoder layers, map masks, cut the cache, scatter the result back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mustdrop import budget, kv
from mustdrop.compat import is_compiling
from mustdrop.errors import MustDropError, UnsupportedOptionError
from mustdrop.kernels.reference import row_probabilities
from mustdrop.runtime.masks import Layout, physical_mask
from mustdrop.runtime.rows import PAD, has_padding, pack, take
from mustdrop.runtime.state import Call, Forward, Prefill

if TYPE_CHECKING:
    from mustdrop.runtime.core import Runtime

_HANDLED = {"attention_mask", "position_ids", "past_key_values", "use_cache"}


@dataclass
class LayerHook:
    """Pre-hook of one decoder layer."""

    stage: TextStage
    index: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.stage.before_layer(self.index, args, kwargs)


@dataclass
class AttentionCapture:
    """Capture point of one decoder layer's attention."""

    stage: TextStage
    index: int

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        self.stage.capture(self.index, module, q, k, mask, kwargs)


class TextStage:
    """Runs the prefill and decode sockets of one patched model."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    # -- entry --------------------------------------------------------------------------------------------------------

    def before_text(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adopt the cache, find the vision tokens of this pass, take the NaN marks out of the embeddings."""
        runtime, local = self.runtime, self.runtime.local
        local.forward, local.capture = None, None
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        vision, local.vision = local.vision, None
        if embeds is None or is_compiling():
            return None
        if module.training and getattr(module, "is_gradient_checkpointing", False):
            raise UnsupportedOptionError(
                "training a patched model with gradient checkpointing is not supported: the layers would run twice. "
                "Call model.gradient_checkpointing_disable(), or unpatch the model while it trains."
            )
        config = module.config
        use_cache = kwargs.get("use_cache")
        cache = kv.adopt(kwargs.get("past_key_values"), config, runtime.depth, bool(config.use_cache if use_cache is None else use_cache))
        if cache is not None:
            kwargs["past_key_values"] = cache
        start = int(cache.get_seq_length()) if cache is not None else 0
        forward = local.forward = Forward(embeds.shape[1], start, embeds.shape[0], cache)
        if vision is None or not bool(vision.any()):
            self._evict(forward)
            self._begin_record(forward, torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device), kwargs)
            return args, kwargs
        self._enter(forward, embeds, vision, kwargs)
        assert forward.alive is not None  # noqa: S101  (set by _enter)
        if runtime.encoder is not None:
            kwargs["inputs_embeds"] = embeds.masked_fill(~forward.alive[..., None], 0.0)
        return args, kwargs

    def _enter(self, forward: Forward, embeds: Tensor, vision: Tensor, kwargs: dict[str, Any]) -> None:
        runtime, call = self.runtime, self.runtime.local.call
        device = embeds.device
        forward.valid = _valid(vision.to(device), kwargs)
        forward.vision = vision = vision.to(device) & forward.valid
        forward.alive = ~(vision & embeds[..., 0].isnan()) if runtime.encoder is not None else torch.ones_like(vision)
        forward.raters = self._raters(forward, call)
        totals = vision.sum(1).tolist()
        marks = self._marks(call, totals)
        if marks:
            self._spread_marks(forward, marks)
        self._schedule(forward, totals)
        self._begin_record(forward, vision, kwargs, marks)

    def _begin_record(self, forward: Forward, vision: Tensor, kwargs: dict[str, Any], marks: list[Any] | None = None) -> None:
        """The first pass of a call is the one that the trace describes."""
        call = self.runtime.local.call
        if call is None:
            return
        if call.prefill is None:
            call.prefill = forward.record = Prefill(vision, forward.start, _valid(vision, kwargs), marks=marks or [])
        else:
            call.steps += forward.length

    def _raters(self, forward: Forward, call: Call | None) -> Tensor:
        """(B, length) bool: valid text after the last vision token; with labels the prompt part of it; else the last token."""
        vision, valid = forward.vision, forward.valid
        assert vision is not None and valid is not None  # noqa: S101
        index = torch.arange(forward.length, device=vision.device)
        last = torch.where(vision, index, -1).amax(1, keepdim=True)
        text = valid & ~vision & (index > last)
        if call is not None and call.labels is not None and call.labels.shape == text.shape:
            prompt = text & (call.labels.to(text.device) == -100)
            text = torch.where(prompt.any(1, keepdim=True), prompt, text)
        final = torch.where(valid, index, -1).amax(1, keepdim=True)
        return torch.where(text.any(1, keepdim=True), text, index == final)

    def _marks(self, call: Call | None, totals: list[int]) -> list[Any]:
        """Marks of the vision stage per batch row, repeated where the batch was expanded for beams; empty if there are none."""
        if call is None or not call.marks or len(totals) % len(call.marks):
            return []
        times = len(totals) // len(call.marks)
        rows = [row for row in call.marks for _ in range(times)]
        fits = all(sum(len(mark.alive) for mark in row) == total for row, total in zip(rows, totals, strict=True))
        return rows if fits else []

    def _spread_marks(self, forward: Forward, marks: list[Any]) -> None:
        vision = forward.vision
        assert vision is not None  # noqa: S101
        pinned = torch.zeros_like(vision)
        importance = torch.zeros(vision.shape, dtype=torch.float32, device=vision.device)
        index = torch.arange(forward.length, device=vision.device)
        order = index.expand_as(vision).clone()
        for b, row in enumerate(marks):
            if not row:
                continue
            place = vision[b].nonzero()[:, 0]
            pinned[b, place] = torch.cat([mark.pinned for mark in row]).to(vision.device)
            importance[b, place] = torch.cat([mark.importance for mark in row]).to(vision.device)
            starts = torch.tensor([0, *[len(mark.alive) for mark in row]], device=vision.device).cumsum(0)
            ordered = torch.cat([mark.order.to(vision.device) + start for mark, start in zip(row, starts, strict=False)])
            order[b, place] = place[ordered] if self.runtime.method.renumber else place
        forward.pinned, forward.importance = pinned, importance
        forward.order = order if self.runtime.method.renumber else None

    def _schedule(self, forward: Forward, totals: list[int]) -> None:
        runtime = self.runtime
        prefill = runtime.method.prefill
        if prefill is None or prefill.keep is None:
            return
        assert forward.vision is not None and forward.alive is not None  # noqa: S101
        present = (forward.vision & forward.alive).sum(1).tolist()
        rows = []
        for total, entering in zip(totals, present, strict=True):
            plan = runtime.plan(total)
            counts = (0,) * len(runtime.filters)
            if total and plan.tokens is not None:
                counts = budget.spread(entering, runtime.depth, runtime.filters, plan.tokens, what=f"keep={prefill.keep}")
            rows.append(counts)
        device = forward.vision.device
        # a filter that keeps everything in every row is skipped: no scoring, no gathering
        entering_now = present
        forward.counts = []
        for k in range(len(runtime.filters)):
            wanted = [row[k] for row in rows]
            forward.counts.append(torch.tensor(wanted, device=device) if wanted != entering_now else torch.empty(0, dtype=torch.long))
            entering_now = wanted

    # -- layers -------------------------------------------------------------------------------------------------------

    def before_layer(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Drop rows if it is this layer's turn, then bring the layer's arguments in line with the rows that are left."""
        forward = self.runtime.local.forward
        if forward is None:
            return None
        cache = kwargs.get("past_key_values")
        layer = cache.layers[i] if cache is not None else None
        if layer is not None:
            layer.prepared = True
        if not forward.prunes:
            return self._extend(i, layer, forward, args, kwargs)
        hidden: Tensor = args[0]
        if i == 0 and forward.alive is not None and self.runtime.encoder is not None and not bool(forward.alive.all()):
            hidden = self._gather(forward, hidden, forward.alive)
        elif i - 1 in self.runtime.filters:
            hidden = self._filter(forward, self.runtime.filters.index(i - 1), hidden)
        self._record(forward, layer)
        self._arm(i, forward)
        if layer is not None:
            layer.arrival = self._arrival(forward)
        if forward.rows is not None:
            self._rewrite(i, layer, forward, hidden, kwargs)
        elif layer is not None and layer.positions is not None:
            self._extend(i, layer, forward, args, kwargs)
        return (hidden, *args[1:]), kwargs

    def _record(self, forward: Forward, layer: Any = None) -> None:
        if forward.record is not None:
            forward.record.rows.append(forward.rows)
            forward.record.past.append(layer.slots if layer is not None else 0)

    def _arm(self, i: int, forward: Forward) -> None:
        """Want a capture at a filter layer, unless its count says that nothing will go."""
        if i not in self.runtime.filters:
            return
        skip = forward.counts is not None and forward.counts[self.runtime.filters.index(i)].numel() == 0
        self.runtime.local.capture = None if skip else ("text", i)

    def _arrival(self, forward: Forward) -> kv.Arrival:
        key = "arrival"
        if key not in forward.memo:
            assert forward.vision is not None  # noqa: S101
            index = forward.index(forward.vision.device)
            positions = (index + forward.start).masked_fill(index == PAD, PAD)
            totals = forward.vision.sum(1)
            forward.memo[key] = kv.Arrival(positions, forward.current(forward.vision), totals, forward.length)
        return forward.memo[key]  # type: ignore[no-any-return]

    def _filter(self, forward: Forward, k: int, hidden: Tensor) -> Tensor:
        attention, forward.attention = forward.attention, None
        if forward.counts is not None and not forward.counts[k].numel():
            return hidden
        if attention is None:
            raise MustDropError(f"decoder layer {self.runtime.filters[k]} ran without its attention being read: its attention module does not ask its config.")
        prefill = self.runtime.method.prefill
        assert prefill is not None and forward.vision is not None  # noqa: S101
        vision = forward.current(forward.vision)
        index = forward.index(hidden.device)
        selection = prefill(
            attention,
            vision,
            count=None if forward.counts is None else forward.counts[k],
            pinned=None if forward.pinned is None else forward.current(forward.pinned),
            importance=None if forward.importance is None else take(forward.importance, index, 1),
        )
        keep = selection.mask(vision.shape[1]) | ~vision
        if bool(keep.all()):
            return hidden
        return self._gather(forward, hidden, keep)

    def _gather(self, forward: Forward, hidden: Tensor, keep: Tensor) -> Tensor:
        """Keep the rows where `keep`, (B, rows now), is True; left padding of the prompt goes at the first gather."""
        assert forward.valid is not None  # noqa: S101
        keep = keep & forward.current(forward.valid)
        first = forward.rows is None
        place = pack(keep, forward.order if first else None)
        index = forward.index(hidden.device)
        rows = take(index, place, 1).masked_fill(place == PAD, PAD)
        forward.rows, forward.memo = rows, {}
        forward.padded = has_padding(rows)
        hidden = take(hidden, place, 1)
        return hidden.masked_fill((rows == PAD)[..., None], 0) if forward.padded else hidden

    def _layout(self, i: int, layer: Any, forward: Forward) -> Layout:
        past = layer.positions if layer is not None else None
        key = ("layout", id(past) if past is not None else None, layer.slots if layer is not None else 0)
        if key not in forward.memo:
            arrival = self._arrival(forward)
            before = layer.slot_positions() if layer is not None else None
            slots = arrival.positions if before is None else torch.cat([before, arrival.positions], 1)
            padded = forward.padded or (layer is not None and layer.padded)
            forward.memo[key] = Layout(forward.index(slots.device), arrival.positions, slots, padded, self.runtime.method.renumber)
        return forward.memo[key]  # type: ignore[no-any-return]

    def _rewrite(self, i: int, layer: Any, forward: Forward, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Positions, masks and whatever else has one entry per row, for the rows that are left."""
        assert forward.rows is not None  # noqa: S101
        layout = self._layout(i, layer, forward)
        if layer is not None:
            layer.padded = layout.padded
        self._map_mask(layout, forward, hidden, kwargs)
        for name, value in kwargs.items():
            if name.startswith("position_embeddings") and value is not None:
                kwargs[name] = self._rotary(layout, forward, hidden, value)
            elif name == "position_ids" and value is not None:
                kwargs[name] = None if self.runtime.flash else take(value, forward.rows, 1)
            elif name not in _HANDLED and isinstance(value, Tensor) and forward.length in value.shape and forward.length > 1:
                raise UnsupportedOptionError(
                    f"decoder layers of {type(self.runtime.text).__name__} take {name} with one entry per token, which mustdrop does not know how to cut."
                )

    def _map_mask(self, layout: Layout, forward: Forward, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        key = ("mask", id(mask), id(layout))
        if key not in forward.memo:
            forward.memo[key] = (mask, physical_mask(mask, layout, self.runtime.implementation, hidden.dtype))
        kwargs["attention_mask"] = forward.memo[key][1]

    def _rotary(self, layout: Layout, forward: Forward, hidden: Tensor, value: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        key = ("rotary", id(value), id(layout))
        if key not in forward.memo:
            if self.runtime.method.renumber:
                # position = how many stored tokens come before, which is what the released code's shorter sequence amounts to
                place = (layout.slots != PAD).cumsum(1)[:, -layout.queries.shape[1] :] - 1
                made = tuple(self.runtime.text.rotary_emb(hidden, place.clamp(min=0)))
            else:
                made = tuple(
                    take(t, layout.rows, 1) if t.ndim == 3 else torch.stack([take(axis, layout.rows, 1) for axis in t]) for t in value
                )
            forward.memo[key] = (value, made)
        return forward.memo[key][1]  # type: ignore[no-any-return]

    def _extend(self, i: int, layer: Any, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A decode step, or any chunk in which nothing is dropped, over a cache that has been pruned."""
        if layer is None or layer.positions is None:
            return None
        if self._scores_decode and not forward.prunes:
            self.runtime.local.capture = ("text", i)
        hidden: Tensor = args[0]
        mask = kwargs.get("attention_mask")
        renumber = self.runtime.method.renumber
        if mask is None and not layer.padded and forward.length == 1 and not renumber and not self.runtime.flash:
            return None
        key = ("extend", id(layer.positions), layer.slots, id(mask))
        if key not in forward.memo:
            slots = layer.slot_positions(extra=forward.length)
            rows = forward.index(slots.device)
            layout = Layout(rows, slots[:, -forward.length :], slots, layer.padded, renumber)
            forward.memo[key] = (layer.positions, mask, layout)
        layout = forward.memo[key][2]
        self._map_mask(layout, forward, hidden, kwargs)
        if self.runtime.flash:
            kwargs["position_ids"] = None
        if renumber:
            for name, value in kwargs.items():
                if name.startswith("position_embeddings") and value is not None:
                    kwargs[name] = self._rotary(layout, forward, hidden, value)
        return args, kwargs

    # -- scores -------------------------------------------------------------------------------------------------------

    @property
    def _scores_decode(self) -> bool:
        decode = self.runtime.method.decode
        return decode is not None and decode.keep is not None

    def capture(self, i: int, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Attention of the rows that matter: text rows at a filter layer, the new tokens while decoding."""
        forward = self.runtime.local.forward
        if forward is None:
            return
        scaling = kwargs.get("scaling") or getattr(module, "scaling", None) or q.shape[-1] ** -0.5
        if forward.prunes:
            assert forward.raters is not None and forward.valid is not None  # noqa: S101
            rows = pack(forward.current(forward.raters) & forward.current(forward.valid))
        else:
            rows = torch.arange(q.shape[2], device=q.device).expand(q.shape[0], -1)
        visible, bias = _visibility(rows, mask, q.shape[2], k.shape[2])
        probability = row_probabilities(q, k, rows, visible, scaling, bias, kwargs.get("softcap"))
        if forward.prunes:
            forward.attention = probability[..., -q.shape[2] :]
            if forward.record is not None:
                forward.record.raters = max(forward.record.raters, rows.shape[1])
                forward.record.scored.append(i)
        elif forward.cache is not None:
            forward.cache.layers[i].accumulate(probability.sum(1))

    # -- exit ---------------------------------------------------------------------------------------------------------

    def after_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Scatter the hidden states back to the logical length; cut the earlier layers' caches."""
        local = self.runtime.local
        forward, local.forward, local.capture = local.forward, None, None
        if forward is None or output is None:
            return None
        call = local.call
        if call is not None:
            call.cache = forward.cache
        if not forward.prunes:
            return None
        self._record(forward)
        if forward.cache is not None:
            self._cascade(forward)
        if forward.rows is None:
            return None
        if call is not None and call.labels is not None:
            self._mask_labels(call.labels, forward)
        output.last_hidden_state = _scatter(output.last_hidden_state, forward)
        return output

    def _mask_labels(self, labels: Tensor, forward: Forward) -> None:
        """A dropped token predicts nothing: its successor leaves the loss. `labels` is our own copy."""
        here = torch.zeros(labels.shape[0], forward.length + 1, dtype=torch.bool, device=labels.device)
        rows = forward.index(labels.device).to(labels.device)
        here.scatter_(1, rows.masked_fill(rows == PAD, forward.length), True)
        labels[:, 1:].masked_fill_(~here[:, : forward.length - 1], -100)

    def _cascade(self, forward: Forward) -> None:
        """At the end of the prefill: earlier layers' caches lose what later layers dropped."""
        decode, layers = self.runtime.method.decode, forward.cache.layers
        if forward.rows is None:
            if not self._scores_decode:
                for layer in layers:
                    layer.forget_if_whole()
            return
        if decode is None or not decode.cascade:
            return
        final = forward.rows
        here = torch.zeros(forward.batch, forward.length + 1, dtype=torch.bool, device=final.device)
        here = here.scatter(1, final.masked_fill(final == PAD, forward.length), True)[:, :-1]
        kv.evict_dropped(layers[decode.full_layers :], forward.start, here)

    def _evict(self, forward: Forward) -> None:
        """Before a decode step: the least attended vision entries leave if it is time."""
        decode = self.runtime.method.decode
        if decode is None or decode.keep is None or forward.cache is None:
            return
        for layer in forward.cache.layers:
            if layer.attended is None or not decode.due(layer.steps + 1):
                continue
            score = torch.nn.functional.pad(layer.attended, (0, layer.slots - layer.attended.shape[1]))
            layer.evict(decode(score, layer.slot_vision(), decode.counts(layer.totals)).mask(layer.slots))


def _valid(vision: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """(B, length) bool, tokens of this pass that are not padding."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, -vision.shape[1] :].to(vision.device).bool()
    return torch.ones_like(vision)


def _visibility(rows: Tensor, mask: Tensor | None, queries: int, keys: int) -> tuple[Tensor, Tensor | None]:
    """Which keys each scoring row sees, (B, R, keys) bool, and the additive part of its mask, if any."""
    index = torch.arange(keys, device=rows.device)
    causal = index <= (rows + keys - queries)[..., None]
    if mask is None:
        return causal, None
    if mask.ndim == 2:
        return causal & mask[:, None, :keys].bool(), None
    picked = take(mask.expand(rows.shape[0], -1, -1, -1) if mask.shape[0] == 1 else mask, rows, 2)[..., :keys]
    if picked.dtype == torch.bool:
        return picked[:, 0], None
    return picked[:, 0] > torch.finfo(picked.dtype).min / 2, picked


def _scatter(hidden: Tensor, forward: Forward) -> Tensor:
    """(B, n, C) rows -> (B, length, C) at their chunk indices, zero where tokens were dropped."""
    rows = forward.index(hidden.device).to(hidden.device)
    full = hidden.new_zeros(hidden.shape[0], forward.length + 1, hidden.shape[2])
    full = full.scatter(1, rows.masked_fill(rows == PAD, forward.length)[..., None].expand_as(hidden), hidden)
    return full[:, :-1]
