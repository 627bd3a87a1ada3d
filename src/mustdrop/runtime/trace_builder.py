"""What a call leaves when it has ended, and the `Trace` that is made of it when somebody asks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mustdrop import kv
from mustdrop.cost import Compared, EncoderCost, TextCost, total
from mustdrop.indices import PAD, take
from mustdrop.runtime.language import old_pictures
from mustdrop.runtime.records import Prefill
from mustdrop.runtime.state import Call

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime
    from mustdrop.runtime.vision.encoder_run import EncoderRun
    from mustdrop.trace import Trace


@dataclass(frozen=True, eq=False)
class EncoderPass:
    """A pass of media through an encoder.

    Attributes:
        cost: of the encoder.
        prefix: tokens before the patches.
        lengths: per encoder layer, the lengths of the sequences that attended to themselves.
        merged: whether tokens merged.
        uncut: as `lengths`, had no patch left a packed encoder; empty for others.
        skipped: FLOPs that its mergers did not spend, since they ran on fewer cells.
        unmade: patches that were never made of their pixels.
        rated: layers of which attention was read, as places in `lengths`, and whether that of every query was.
    """

    cost: EncoderCost
    prefix: int
    lengths: list[Sequence[int] | Tensor]
    merged: bool
    uncut: list[Sequence[int] | Tensor]
    skipped: int
    unmade: int = 0
    rated: Sequence[tuple[int, bool]] = ()


@dataclass(frozen=True, eq=False)
class EndedCall:
    """What is left of a call: numbers and references, gathered without asking a device for anything.

    The references are to tensors that nobody changes in place; of the cache only what is small is kept. So the trace
    that is made later, or never, describes the call as it ended.

    Attributes:
        method: name of the method.
        filters: decoder layers after which tokens left.
        depth: decoder layers.
        prefill: record of the prompt's pass.
        stored: what each cache layer stores; empty without a cache.
        kv_bytes: of keys and values.
        steps: logical tokens that followed the first pass, as far as the hooks saw them.
        text: sizes of the text model.
        encoded: passes through encoders.
        projector: FLOPs of what maps features into the language model.
        backend: see `Trace`.
        kernels: see `Trace`.
        fit: see `Trace`.
        recurrent: see `Trace`.
    """

    method: str
    filters: tuple[int, ...]
    depth: int
    prefill: Prefill
    stored: list[kv.Stored]
    kv_bytes: Compared
    steps: int
    text: TextCost
    encoded: list[EncoderPass]
    projector: int
    backend: str
    kernels: str
    fit: Literal["crop", "stretch"]
    recurrent: tuple[int, ...] = ()

    @classmethod
    def of(cls, runtime: Runtime, call: Call) -> EndedCall:
        """What is left of a call of a patched model."""
        prefill, depth = call.prefill, runtime.depth
        if prefill is None:  # nothing went through the text model
            empty = torch.zeros(1, 1, dtype=torch.bool, device="cpu")
            prefill = Prefill(empty, 0, empty)
        layers = [] if call.cache is None else call.cache.layers[:depth]
        encoded = [
            EncoderPass(
                runtime.encoder_cost(run.tower),
                run.tower.prefix,
                run.lengths,
                run.merged is not None,
                run.uncut,
                runtime.skipped(run),
                _unmade(run),
                [(place, of_all) for (place, _), of_all in run.rated.items()],
            )
            for run in call.encoded
            if run.lengths
        ]
        return cls(
            method=runtime.method.name,
            filters=runtime.filters,
            depth=depth,
            prefill=prefill,
            stored=kv.stored(layers),
            kv_bytes=_kv_bytes(layers),
            steps=call.steps,
            text=runtime.text_cost,
            encoded=encoded,
            projector=_projector_flops(runtime, call),
            backend=runtime.implementation,
            kernels=", ".join(sorted(call.kernels)) or "none",
            fit=runtime.adapter.fit(runtime.model),
            recurrent=tuple(sorted(runtime.recurrent)),
        )

    @property
    def dropped_anything(self) -> bool:
        """As `Trace.dropped_anything`, from little: what is gone after the last layer tells it of all layers."""
        if self.kv_bytes.actual < self.kv_bytes.unpruned:
            return True
        vision, last = self.prefill.vision, self.prefill.rows[-1] if self.prefill.rows else None
        last = None if last is None else last.cpu()
        left = vision & self.prefill.valid if last is None else take(vision, last, 1) & (last != PAD)
        return bool((left.sum(1) < vision.sum(1)).any())

    @functools.cached_property
    def trace(self) -> Trace:
        """The trace of the call."""
        from mustdrop.trace import Trace  # here: to patch a model takes no trace

        prefill, depth = self.prefill, self.depth
        rows: list[Tensor | None] = prefill.rows or [None] * (depth + 1)
        alive = _alive(prefill, rows)
        tokens = torch.tensor([[len(a) for a in layer] for layer in alive[:depth]], dtype=torch.long, device="cpu")
        kv_lengths, held = _entries(self.stored, prefill, depth, len(alive[0]))
        return Trace(
            method=self.method,
            total=prefill.vision.sum(1).cpu(),
            tokens=tokens,
            kv_lengths=kv_lengths,
            kv_vision=held,
            flops=_flops(self, rows, tokens, kv_lengths),
            kv_bytes=self.kv_bytes,
            backend=self.backend,
            kernels=self.kernels,
            filters=self.filters,
            fit=self.fit,
            media=prefill.media,
            kv_pictures=_pictures(self.stored),
            recurrent=self.recurrent,
            _alive=alive,
            _marks=prefill.of_prompts(),
            _heard=prefill.heard,
            _vision=prefill.vision,
        )

    @property
    def logical_steps(self) -> int:
        """Logical tokens that followed the first pass.

        Of a static cache those that it counted: the hooks see no compiled step.
        """
        fixed = next((layer for layer in self.stored if isinstance(layer.slots, Tensor)), None)
        if fixed is not None:
            return fixed.logical - self.prefill.start - self.prefill.valid.shape[1]
        return self.steps


def _entries(layers: list[kv.Stored], prefill: Prefill, depth: int, batch: int) -> tuple[Tensor, Tensor]:
    """(L, B) long: entries of each cache layer, and those of this prompt's vision tokens.

    Layers with the same entries share the result.
    """
    if not layers:
        nothing = torch.zeros(depth, batch, dtype=torch.long, device="cpu")
        return nothing, nothing
    done: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    seen = prefill.vision & prefill.valid
    for layer in layers:
        if layer.key not in done:
            done[layer.key] = layer.lengths(prefill.start, prefill.valid), layer.held(prefill.start, seen)
    lengths, held = zip(*(done[layer.key] for layer in layers), strict=True)
    return torch.stack(lengths), torch.stack(held)


def _pictures(layers: list[kv.Stored]) -> list[Tensor]:
    """Per sample (L, pictures) long, entries of each picture of the chat; empty where the cache does not know them."""
    found = [old_pictures.by_picture(layer) for layer in layers]
    known = [own for own in found if own is not None]
    if not known or len(known) < len(found):
        return []
    return list(torch.stack(known, 1))


def _alive(prefill: Prefill, rows: list[Tensor | None]) -> list[list[Tensor]]:
    """Per layer and sample, ascending ordinals among the sample's vision tokens.

    Layers that share rows share the result.
    """
    vision = prefill.vision.cpu()
    ordinal = vision.long().cumsum(1) - 1
    everything = [names[seen] for names, seen in zip(ordinal, vision & prefill.valid.cpu(), strict=True)]
    done: dict[int, list[Tensor]] = {}
    out = []
    for row in rows:
        if row is None:
            out.append(everything)
            continue
        if id(row) not in done:
            index = row.cpu()
            real = (index != PAD) & take(vision, index, 1)
            names = take(ordinal, index, 1)
            done[id(row)] = [names[b][real[b]].sort().values for b in range(len(names))]
        out.append(done[id(row)])
    return out


def _kv_bytes(layers: list[Any]) -> Compared:
    pairs = [layer.bytes_held() for layer in layers]
    return Compared(sum(actual for actual, _ in pairs), sum(unpruned for _, unpruned in pairs))


def _flops(ended: EndedCall, rows: list[Tensor | None], tokens: Tensor, kv_lengths: Tensor) -> Compared:
    prefill, depth, text = ended.prefill, ended.depth, ended.text
    batch = prefill.vision.shape[0]
    whole, seen = prefill.valid.sum(1).tolist(), (prefill.vision & prefill.valid).sum(1).tolist()
    counts: dict[int, list[int]] = {}
    for row in rows:
        if row is not None and id(row) not in counts:
            counts[id(row)] = (row != PAD).sum(1).tolist()
    new = [[counts[id(row)][b] if row is not None else whole[b] for row in rows[:depth]] for b in range(batch)]
    past = prefill.past[:depth] or [0] * depth
    start = [prefill.start] * depth
    scoring = sum(text.scoring(i, rows, new[b][i] + past[i]) for b in range(batch) for i, rows in prefill.scored)
    logical = [int(n) + prefill.start + ended.logical_steps for n in whole]
    parts = {
        "vision": _encoder_cost(ended.encoded),
        "projector": Compared(ended.projector - sum(run.skipped for run in ended.encoded), ended.projector),
        "scoring": Compared(scoring + sum(map(_rating, ended.encoded)), 0),
        "prefill": Compared(
            sum(text.prefill(new[b], past, tokens[:, b].tolist()) for b in range(batch)),
            sum(text.prefill([whole[b]] * depth, start, [seen[b]] * depth) for b in range(batch)),
        ),
        "decode_step": Compared(
            sum(text.step(kv_lengths[:, b].tolist()) for b in range(kv_lengths.shape[1])),
            sum(text.step([n] * depth) for n in logical),
        ),
    }
    return total(parts, ("vision", "projector", "scoring", "prefill"))


def _unmade(run: EncoderRun) -> int:
    """Patches of a pass that were not made of their pixels."""
    packed = run.packed
    return 0 if packed is None or packed.made is None or packed.unmade is None else len(packed.unmade)


def _encoder_cost(passes: list[EncoderPass]) -> Compared:
    """Of every pass through an encoder, merged and as long as it came in."""
    actual = unpruned = 0
    for run in passes:
        lengths = _known(run.lengths)
        # before windows merge, every layer of items with a batch dimension sees what the first one sees
        whole = _known(run.uncut) if run.uncut else [lengths[0]] * len(lengths) if run.merged else lengths
        patches = sum(whole[0]) - run.prefix * len(whole[0])
        actual += run.cost.embedding * (patches - run.unmade) + run.cost.layers(lengths)
        unpruned += run.cost.embedding * patches + run.cost.layers(whole)
    return Compared(actual, unpruned)


def _rating(run: EncoderPass) -> int:
    """FLOPs of reading what patches of an encoder pay attention to: the logits of all of them, or of CLS, once more."""
    lengths = _known([run.lengths[place] for place, _ in run.rated])
    pairs = (sum(n * n if of_all else n for n in own) for own, (_, of_all) in zip(lengths, run.rated, strict=True))
    return 2 * run.cost.width * sum(pairs)


def _known(lengths: Sequence[Sequence[int] | Tensor]) -> list[Sequence[int]]:
    """On the host; those that are one object are asked for once."""
    known = {id(own): own.tolist() if isinstance(own, Tensor) else own for own in lengths}
    return [known[id(own)] for own in lengths]


def _projector_flops(runtime: Runtime, call: Call) -> int:
    features = sum(layout.size for rows in call.layouts.values() for row in rows for layout in row)
    return runtime.projector_flops * features if features else 0
