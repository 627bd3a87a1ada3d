"""`positions="renumbered"`: what is left counts anew, as if the rest had never been in the prompt."""

from __future__ import annotations

import inspect

import pytest
import torch

import mustdrop
from mustdrop import DecodeCachePruner, PrefillPruner, VisionStagePruner, errors
from mustdrop.adapters import registry
from mustdrop.method import Method
from support import families
from support.builders import answer
from support.families import batch, clone, plain

FAMILIES = families.PAIRS
TOLERANCE = 1e-5


def shorter(name, inputs, kept, said):
    """Logits of the plain language model over the embeddings of `kept` and of `said`, positions 0, 1, 2, ..."""
    model = plain(name)
    text, seen = registry()[name].text(model), {}

    def look(module, args, kwargs):
        seen.setdefault("embeds", kwargs["inputs_embeds"])

    hook = text.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
            hook.remove()
            embeds = torch.cat([seen["embeds"][:, kept], text.embed_tokens(said)], 1)
            place = torch.arange(embeds.shape[1])[None]
            hidden = text(inputs_embeds=embeds, position_ids=place, use_cache=False).last_hidden_state
            return model.lm_head(hidden)[:, -1]
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_renumbered_is_the_shorter_prompt(name):
    """One axis of positions and three; the prompt's pass and two decode steps."""
    model = mustdrop.patch(clone(name), "divprune", keep=0.5, positions="renumbered")
    inputs = batch(registry()[name], model, (("image",),))
    got, trace = answer(model, inputs, 3), mustdrop.last_trace(model)
    assert trace.dropped_anything
    marked = _places(name, inputs)
    alive = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    alive[marked] = False
    alive[marked[torch.as_tensor(trace.kept(0, 0))]] = True
    kept, start = alive.nonzero()[:, 0], inputs["input_ids"].shape[1]
    for step in range(3):
        expected = shorter(name, inputs, kept, got.sequences[:, start : start + step])
        assert (got.logits[:, step] - expected).abs().max() <= TOLERANCE


def _places(name, inputs):
    """Where the vision tokens of the only row are."""
    token = plain(name).config.image_token_id
    return (inputs["input_ids"][0] == token).nonzero()[:, 0]


def test_filters_renumber_too_and_nothing_dropped_changes_no_bit():
    inputs = batch(registry()["llava"], clone("llava"), (("image",), ("image", "image")))
    whole = answer(plain("llava"), inputs, 2)
    same = mustdrop.patch(clone("llava"), Method(prefill=PrefillPruner(keep=1.0), positions="renumbered"))
    assert torch.equal(answer(same, inputs, 2).logits, whole.logits)
    kept, moved = (
        answer(mustdrop.patch(clone("llava"), Method(prefill=PrefillPruner(keep=0.5), positions=how)), inputs, 2)
        for how in ("kept", "renumbered")
    )
    assert not torch.equal(kept.logits, moved.logits)
    assert moved.logits.isfinite().all()


@pytest.mark.parametrize("method", ["divprune", "tome", "fastv"])
def test_a_padded_row_equals_the_same_row_alone(method):
    model = mustdrop.patch(clone("llava"), method, keep=0.5, positions="renumbered")
    inputs = batch(registry()["llava"], model, (("image",), ("image", "image")))
    together = answer(model, inputs, 2)
    seen = inputs["attention_mask"][0].bool()
    alone = {name: value[:1] for name, value in inputs.items()}
    alone |= {name: inputs[name][:1, seen] for name in ("input_ids", "attention_mask")}
    assert (together.logits[0] - answer(model, alone, 2).logits[0]).abs().max() <= TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_every_attention_renumbers_alike(attention):
    inputs = batch(registry()["llava"], clone("llava"), (("image",), ("image", "image")))
    (one, other) = (
        mustdrop.patch(clone("llava", kind), "divprune", keep=0.5, positions="renumbered")
        for kind in ("sdpa", attention)
    )
    assert (answer(one, inputs, 3).logits - answer(other, inputs, 3).logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_a_static_cache_renumbers_alike(method):
    model = mustdrop.patch(clone("llava"), method, keep=0.5, positions="renumbered")
    inputs = batch(registry()["llava"], model, (("image",), ("image", "image")))
    expected, got = answer(model, inputs, 3), answer(model, inputs, 3, cache_implementation="static")
    assert (got.logits - expected.logits).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("name", "kind"), FAMILIES, ids=map("-".join, FAMILIES))
def test_every_family_renumbers_or_says_why_not(name, kind):
    adapter, model = registry()[name], clone(name)
    how = Method(vision=VisionStagePruner(window=None, key_share=0, keep=0.5), positions="renumbered")
    if "vision" in adapter.lacks:
        pytest.skip("this family has no vision stage")
    rotary = getattr(adapter.text(model), "rotary_emb", None)
    if rotary is None or "layer_type" in inspect.signature(rotary.forward).parameters:
        with pytest.raises(errors.UnsupportedModelError, match='positions="renumbered" renumbers positions'):
            mustdrop.patch(model, how)
        return
    mustdrop.patch(model, how)
    assert answer(model, batch(adapter, model, ((kind,), (kind, kind))), 2).logits.isfinite().all()
    assert mustdrop.trace(model).dropped_anything


def test_what_cannot_be_renumbered_says_so():
    with pytest.raises(errors.ConfigError, match='positions must be "kept" or "renumbered"'):
        Method(positions="anew")
    with pytest.raises(errors.ConfigError, match="cannot be combined with a decode stage"):
        Method(decode=DecodeCachePruner(), positions="renumbered")
    with pytest.raises(errors.UnsupportedModelError, match='positions="renumbered" renumbers positions'):
        mustdrop.patch(clone("gemma3"), "divprune", keep=0.5, positions="renumbered")
