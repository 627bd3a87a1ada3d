"""Bad input, for every family: the error names the cause, and the model works afterwards."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import DynamicCache

import mustdrop
from mustdrop import PrefillPruner, VisionStagePruner, errors
from mustdrop.adapters import registry
from support import families
from support.builders import answer
from support.families import batch, clone, fitting, new_cache, plain

FAMILIES = families.PAIRS
HALF = {"prefill": PrefillPruner(keep=0.5)}
each = pytest.mark.parametrize(("name", "kind"), FAMILIES, ids=map("-".join, FAMILIES))


def still_works(model, name, kind):
    inputs = batch(registry()[name], model, ((kind,),))
    mustdrop.unpatch(model)
    assert torch.equal(answer(model, inputs, 1).logits, answer(plain(name), inputs, 1).logits)


def needs_the_vision_stage(name):
    if "vision" in registry()[name].lacks:
        pytest.skip("this family has no vision stage")


@each
def test_media_without_frames(name, kind):
    adapter, model = (
        registry()[name],
        mustdrop.patch(clone(name), **fitting(name, HALF)),
    )
    inputs = batch(adapter, model, ((kind,),))
    (modality,) = [m for m in adapter.modalities(model) if m.name == kind]
    (pixels,) = [argument for argument in modality.pixels if argument in inputs]
    bad = inputs[pixels]
    bad = bad[:, :0] if kind == "video" and bad.ndim == 5 else bad[:0]
    with pytest.raises(errors.ConfigError, match=f"a {kind} without"):
        answer(model, inputs | {pixels: bad}, 1)
    still_works(model, name, kind)


@each
def test_more_placeholders_than_features(name, kind):
    adapter, model = (
        registry()[name],
        mustdrop.patch(clone(name), **fitting(name, HALF)),
    )
    inputs = batch(adapter, model, ((kind,),))
    (modality,) = [m for m in adapter.modalities(model) if m.name == kind]
    inputs["input_ids"][0, -2] = modality.token
    if adapter.token_types is not None:
        inputs[adapter.token_types][0, -2] = inputs[adapter.token_types].max()
    with pytest.raises((ValueError, errors.MustDropError, RuntimeError), match=r"do(es)? not match|expected"):
        answer(model, inputs, 1)
    still_works(model, name, kind)


@each
def test_a_picture_smaller_than_a_window(name, kind):
    needs_the_vision_stage(name)
    model = mustdrop.patch(clone(name), vision=VisionStagePruner(window=20), strict=True)
    with pytest.raises(errors.ConfigError, match="smaller than one window"):
        answer(model, batch(registry()[name], model, ((kind,),)), 1)
    still_works(model, name, kind)


@each
def test_a_cache_that_another_model_made(name, kind):
    model = mustdrop.patch(clone(name), **fitting(name, HALF))
    inputs = batch(registry()[name], model, ((kind,),))
    layers = len(registry()[name].decoder_layers(model))
    recurrent = registry()[name].recurrent(model)
    for depth, heads in ((layers - 1, 2), (layers, 3)):
        cache = new_cache(model) if recurrent else DynamicCache()
        for i in set(range(depth)) - set(recurrent):
            cache.update(torch.zeros(1, heads, 4, 16), torch.zeros(1, heads, 4, 16), i)
        with pytest.raises(errors.CacheStateError, match="another model made it"):
            answer(model, inputs, 1, past_key_values=cache)
    still_works(model, name, kind)


@each
def test_processor_and_config_disagree(name, kind):
    """Features that do not fit the layout that the config promises."""
    needs_the_vision_stage(name)
    adapter, model = registry()[name], clone(name)
    (modality,) = [m for m in adapter.modalities(model) if m.name == kind]
    base, function = adapter.base(model), getattr(adapter.base(model), modality.method)

    def one_less(*args, **kwargs):
        output = function(*args, **kwargs)
        made = getattr(output, adapter.features)
        less = made[..., 1:, :] if isinstance(made, torch.Tensor) else [part[1:] for part in made]
        setattr(output, adapter.features, less)
        return output

    one_less.__signature__ = __import__("inspect").signature(function)
    object.__setattr__(base, modality.method, one_less)
    mustdrop.patch(model, vision=VisionStagePruner(window=None, keep=0.5))
    with pytest.raises((errors.MustDropError, ValueError), match=r"the processor and the config|do not match"):
        answer(model, batch(adapter, model, ((kind,),)), 1)


@each
def test_renumbered_positions(name, kind):
    """`compat="released"` renumbers what is left: it runs, or is refused before any work with the way out."""
    needs_the_vision_stage(name)
    model, vision = clone(name), VisionStagePruner(window=2, threshold=-1.0, compat="released")
    rotary = getattr(registry()[name].text(model), "rotary_emb", None)
    if rotary is None or "layer_type" in inspect.signature(rotary.forward).parameters:
        with pytest.raises(errors.UnsupportedModelError, match=r'compat="released" renumbers positions'):
            mustdrop.patch(model, vision=vision)
        assert answer(model, batch(registry()[name], model, ((kind,),)), 1).logits.isfinite().all()
        return
    mustdrop.patch(model, vision=vision)
    inputs = batch(registry()[name], model, ((kind,), (kind, kind)))
    assert answer(model, inputs, 2).logits.isfinite().all()
    assert mustdrop.trace(model).dropped_anything
