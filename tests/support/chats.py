"""Chats of several turns with new pictures, pass by pass, for the tiny model of any family; and the oracle for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import mustdrop
from mustdrop import kv
from mustdrop.adapters import find
from mustdrop.compat import spans
from tests.families import fixture_of

from .builders import CACHE
from .families import FamilyOracle, Recorder, hidden_by, new_cache, vision_positions
from .oracle import Hidden


def positions(model: Any, mask: Tensor, length: int) -> Tensor:
    """(B, length), or with three axes in front of that, of the last tokens of a sequence that ``mask`` covers."""
    place = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
    several = "mrope_section" in (getattr(find(model).text(model).config, "rope_parameters", None) or {})
    return place.expand(3, -1, -1) if several else place


@dataclass
class Said:
    """What a chat gave.

    Attributes:
        logits: (B, passes, V) of the last token of each pass.
        outputs: per turn, what the encoders returned.
        traces: per turn, of a patched model.
        stored: per pass and decoder layer, (B, slots) logical positions of a patched model's entries.
        cache: at the end.
    """

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: list[dict[str, Any]] = field(default_factory=list)
    traces: list[Any] = field(default_factory=list)
    stored: list[list[Tensor | None]] = field(default_factory=list)
    cache: Any = None


def chat(
    model: Any,
    turns: Sequence[dict[str, Tensor]],
    steps: int = 2,
    cache: Any = None,
    before: Callable[[int], None] = lambda turn: None,
) -> Said:
    """Every turn in one pass over one cache, and ``steps`` greedy tokens after each."""
    said, made, mask = Said(cache=cache), [], turns[0]["attention_mask"][:, :0]

    def passed(**given: Any) -> None:
        out = model(
            **given,
            attention_mask=mask,
            position_ids=positions(model, mask, given["input_ids"].shape[1]),
            use_cache=True,
            **{CACHE: said.cache},
        )
        said.cache = getattr(out, CACHE)
        made.append(out.logits[:, -1])
        layers = said.cache.layers
        said.stored.append([layer.slot_positions() if isinstance(layer, kv.Slots) else None for layer in layers])

    patched = "_mustdrop" in vars(model)
    with torch.no_grad():
        for i, turn in enumerate(turns):
            before(i)
            mask = torch.cat([mask, turn["attention_mask"]], 1)
            with Recorder(model) as recorder:
                passed(**{name: value for name, value in turn.items() if name != "attention_mask"})
            said.outputs.append(recorder.outputs)
            said.traces += [mustdrop.trace(model)] if patched else []
            for _ in range(steps):
                ids, mask = made[-1].argmax(-1)[:, None], torch.nn.functional.pad(mask, (0, 1), value=1)
                passed(input_ids=ids, **fixture_of(find(model)).types(torch.zeros_like(ids)))
    said.logits = torch.stack(made, 1)
    return said


def hidden_in(model: Any, turns: Sequence[dict[str, Tensor]], said: Said, steps: int = 2) -> Hidden:
    """What each pass of a chat lacks: what its prefill dropped, and what was no longer stored before it."""
    depth, rows = len(find(model).decoder_layers(model)), len(turns[0]["input_ids"])
    total = sum(turn["input_ids"].shape[1] for turn in turns) + steps * len(turns)
    vision = torch.zeros(rows, total, dtype=torch.bool)
    found, start, number = {}, 0, 0
    gone = torch.zeros(depth, rows, total, dtype=torch.bool)
    for turn, trace in zip(turns, said.traces, strict=True):
        ids = turn["input_ids"]
        own = [vision_positions(model, ids, row) for row in range(rows)]
        for row, where in enumerate(own):
            vision[row, start + where] = True
        if any(map(len, own)):  # entries leave at the end of such a pass, at the beginning of the others
            gone = gone.clone()
            gone[..., start : start + ids.shape[1]] = hidden_by(model, trace, ids).prefill
        else:
            gone = _seen_by(model, said.stored, number, (start, start + ids.shape[1]), vision, gone)
        found[number] = gone
        start += ids.shape[1]
        for step in range(number + 1, number + steps + 1):
            gone = found[step] = _seen_by(model, said.stored, step, (start, start + 1), vision, gone)
            start += 1
        number += steps + 1
    return Hidden(found.pop(0), gone, found)


def _seen_by(
    model: Any,
    stored: Sequence[Sequence[Tensor | None]],
    number: int,
    queries: tuple[int, int],
    vision: Tensor,
    otherwise: Tensor,
) -> Tensor:
    """(L, B, S) vision tokens that pass ``number`` of these queries (from, to) found hidden, by what is stored.

    A sliding layer forgets what leaves its window once the pass is over: its queries still saw that.
    """
    out, before = _missing(stored[number], vision, otherwise), _missing(stored[number - 1], vision, otherwise)
    for layer, span in enumerate(spans(find(model).text(model).config, len(out))):
        if span is not None:
            edge = slice(*(max(int(span.reach(end)), 0) for end in queries))
            out[layer, :, edge] = before[layer, :, edge]
    return out


def _missing(stored: Sequence[Tensor | None], vision: Tensor, otherwise: Tensor) -> Tensor:
    """(L, B, S) vision tokens that each layer does not store; of layers without entries, what their pass left out."""
    out = otherwise.clone()
    for layer, places in enumerate(stored[: len(out)]):
        if places is None:
            continue
        held = torch.zeros(vision.shape[0], vision.shape[1] + 1, dtype=torch.bool)
        held.scatter_(1, places.masked_fill(places < 0, vision.shape[1]), True)
        out[layer] = vision & ~held[:, :-1]
    return out


def answered_by_the_oracle(
    oracle_model: Any, model: Any, turns: Sequence[dict[str, Tensor]], said: Said, steps: int = 2
) -> Tensor:
    """The logits of the unpatched model with the same tokens hidden, from the same passes on."""
    hidden = hidden_in(model, turns, said, steps)
    kinds = {kind: made for outputs in said.outputs for kind, made in outputs.items()}
    with FamilyOracle(oracle_model, hidden, kinds) as oracle:
        cache = new_cache(oracle_model)  # one that forgets nothing: what a sliding layer may not see, the mask says

        def replay(turn: int) -> None:
            oracle.outputs = said.outputs[turn]

        return chat(oracle_model, turns, steps, cache=cache, before=replay).logits
