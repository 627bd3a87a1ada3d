"""Conversations that go on over a pruned cache, against the masked oracle that goes on over a whole one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mustdrop
from mustdrop.adapters import registry
from mustdrop.adapters.base import Adapter
from tests.families import fixture_of

from . import fake_flash
from .builders import answer
from .families import (
    Compared,
    FamilyOracle,
    Recorder,
    batch,
    clone,
    hidden_by,
    new_cache,
    oracles,
    plain,
    vision_positions,
)
from .oracle import CacheWatch, Hidden, _gone


def turns(adapter: Adapter, model: Any, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """A first turn with one medium, and the ids of what is said next."""
    return batch(adapter, model, ((kind,),)), torch.tensor([[31, 57, 86, 110]])


def continued(adapter: Adapter, model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Inputs for the next turn: everything so far, without media."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if adapter.token_types is not None:
        inputs[adapter.token_types] = torch.zeros_like(ids)
    return inputs


def with_a_new_picture(adapter: Adapter, model: Any, kind: str, before: Tensor) -> dict[str, Tensor]:
    """Inputs for the next turn: everything so far, and a question about a new medium, whose pixels alone are given."""
    inputs = batch(adapter, model, ((kind,),), seed=5)
    ids = torch.cat([before, inputs["input_ids"][:, 1:]], 1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if adapter.token_types is not None:
        kinds = {m.token: 1 if m.name == "image" else 2 for m in adapter.modalities(model)}
        inputs |= fixture_of(adapter).types(torch.tensor([[kinds.get(token, 0) for token in ids[0].tolist()]]))
    return inputs


def hidden_in_two_turns(first: Hidden, second: Any, model: Any, ids: Tensor, start: int, step: int) -> Hidden:
    """What both turns hid: ``second`` is the trace of a turn whose prompt begins at ``start`` and is pass ``step``."""
    layers, rows = first.prefill.shape[:2]
    steps = {}
    for now in range(step, step + 8):
        hidden = torch.zeros(layers, rows, ids.shape[1], dtype=torch.bool)
        hidden[:, :, : first.decode.shape[2]] = first.decode
        where = vision_positions(model, ids, 0)
        where = where[where >= start]
        for layer in range(layers):
            cached = layers if now > step and layer >= 2 else layer
            hidden[layer, 0, _gone(where, second.kept(cached))] = True
        steps[now] = hidden
    return Hidden(first.prefill, first.decode, steps)


def skip_where_transformers_cannot_go_on(name: str, first: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    """Skip a test of a new medium in a later turn where the unpatched model raises."""
    try:
        answer(plain(name), again, 1, past_key_values=answer(plain(name), first, 2).cache)
    except (ValueError, RuntimeError, IndexError, StopIteration, TypeError) as error:
        pytest.skip(f"the unpatched model cannot go on with a new picture: {type(error).__name__}")


@functools.lru_cache(maxsize=8)
def _answers(name: str, kind: str, make: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    adapter, model = registry()[name], make()
    first, second = turns(adapter, model, kind)
    one = answer(model, first, 3)
    again = continued(adapter, model, torch.cat([one.sequences, second], 1))
    return one.logits, answer(model, again, 4, past_key_values=one.cache).logits


def skip_where_backends_differ(name: str, kind: str, make: Callable[[], Any]) -> None:
    """Skip a second turn whose backend gives other numbers than sdpa, which the oracle runs, in the unpatched model."""
    ours, oracle = (_answers(name, kind, made) for made in (make, functools.partial(plain, name)))
    if any((a - b).abs().max() > 1e-4 for a, b in zip(ours, oracle, strict=True)):
        pytest.skip("the unpatched model answers a second turn otherwise under this backend than under sdpa")


def compare_two_turns(name: str, kind: str, attention: str = "sdpa", **settings: Any) -> Compared:
    """A prompt, and what is said next over the cache that the first answer left; ``settings`` as for ``compare``.

    Returned are the second answers.
    """
    flash = attention == fake_flash.NAME
    oracle_model, model = plain(name, oracles(attention)), clone(name, attention)
    mustdrop.patch(model, **settings)
    decode = vars(model)["_mustdrop"].method.decode
    adapter = registry()[name]
    first, second = turns(adapter, model, kind)
    with Recorder(model) as recorder, CacheWatch(model) as watch:
        one = answer(model, first, 3)
        trace = mustdrop.trace(model)
        again = continued(adapter, model, torch.cat([one.sequences, second], 1))
        ours = answer(model, again, 4, past_key_values=one.cache)
    hidden = hidden_by(model, trace, first["input_ids"], decode.full_layers if decode and decode.cascade else None)
    if decode is not None and decode.keep is not None:
        with FamilyOracle(oracle_model, Hidden(hidden.prefill, hidden.prefill), recorder.outputs) as oracle:
            answer(oracle_model, first, 0, past_key_values=new_cache(oracle_model))
        where = functools.partial(vision_positions, model)
        hidden = watch.hidden_while_decoding(oracle.prompt_keys, first["input_ids"], hidden, where)
    with fake_flash.exact_sdpa(flash), FamilyOracle(oracle_model, hidden, recorder.outputs):
        start = answer(oracle_model, first, 3, past_key_values=new_cache(oracle_model))
        theirs = answer(oracle_model, again, 4, past_key_values=start.cache)
    assert torch.equal(one.sequences, start.sequences)
    return Compared(ours, theirs, hidden, trace)
