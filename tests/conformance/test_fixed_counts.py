"""Fixed counts: the device decides what the host would, and how many stay follows from the prompt's shape alone."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from transformers.models.llava import modeling_llava

import mustdrop
from mustdrop import VisionStagePruner
from mustdrop.method import Method, find
from mustdrop.method import registry as recipes
from mustdrop.pruners import PrefillPruner, Raters, Recycling
from mustdrop.runtime.language import vision_tokens
from mustdrop.runtime.session import Runtime
from mustdrop.runtime.vision.encoding import Encoding
from support.builders import LLAMA, SIGLIP, batch, clone
from support.edges import BUDGETED

PAIRS = [(name, images) for name in BUDGETED for images in ((1, 1), (1, 2))]


@pytest.fixture
def looks(monkeypatch):
    """A switch: from then on the host looks at everything, as where the data decide how many stay."""

    def switch(windows: bool = False) -> None:
        monkeypatch.setattr(vision_tokens.fixed_rows, "possible", lambda *_: False)
        if not windows:
            monkeypatch.setattr(Encoding, "_counts", lambda *_: None)

    return switch


def answered(model, inputs):
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    trace = mustdrop.trace(model)
    kept = [
        [trace.kept(layer, row).tolist() for layer in range(trace.tokens.shape[0])] for row in range(len(trace.total))
    ]
    return torch.stack(out.logits, 1), kept, trace


@pytest.mark.parametrize(("name", "images"), PAIRS)
def test_the_device_decides_what_the_host_would(name, images, looks):
    model = clone(LLAMA)
    mustdrop.patch(model, name, keep=16)
    inputs = batch(LLAMA, images)
    logits, kept, trace = answered(model, inputs)
    looks()
    theirs, same, other = answered(model, inputs)
    assert kept == same
    assert torch.allclose(logits, theirs, atol=1e-5)
    assert torch.equal(trace.kv_lengths, other.kv_lengths)


def clusters_behind_a_selection():
    """Words are chosen from embeddings of which a part is marked as dropped, and what filters drop is clustered."""
    prefill = PrefillPruner(keep=0.3, score=Raters(), recycle=Recycling(per_cluster=3), layers=(1, 2))
    return Method(vision=VisionStagePruner(window=None, keep=0.7), prefill=prefill)


def clusters_of_attention():
    """As many as the dual attention wants."""
    return Method(prefill=PrefillPruner(keep=0.4, recycle=Recycling(share=0.9, per_cluster=4), layers=(0, 2)))


CLUSTERS = {
    "sparsevlm": lambda: find("sparsevlm", keep=0.5, layers=(0, 2), per_cluster=2),
    "behind a selection": clusters_behind_a_selection,
    "dual attention": clusters_of_attention,
}


@pytest.mark.parametrize("images", [(1,), (1, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_are_those_that_the_host_would_make(name, images, looks):
    model = clone(LLAMA)
    mustdrop.patch(model, CLUSTERS[name]())
    inputs = batch(LLAMA, images)
    logits, kept, _ = answered(model, inputs)
    assert len(kept[0][-1]) < len(kept[0][0])
    looks()
    theirs, same, _ = answered(model, inputs)
    assert kept == same
    assert torch.allclose(logits, theirs, atol=1e-5)


@pytest.mark.parametrize("images", [(1,), (1, 3)], ids=str)
def test_a_later_filter_finds_fewer_tokens_than_it_may_keep(images, looks):
    """Numbers and shares in one list: of a small picture a share may be less than the number behind it."""
    model = clone(LLAMA)
    mustdrop.patch(model, prefill=PrefillPruner(survivors=(0.25, 20), layers=(1, 3)))
    inputs = batch(LLAMA, images)
    logits, kept, _ = answered(model, inputs)
    assert [len(layer) for layer in kept[0][1::2]] == [36, 9, 9]
    looks()
    theirs, same, _ = answered(model, inputs)
    assert kept == same
    assert torch.allclose(logits, theirs, atol=1e-5)


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("variant", [LLAMA, SIGLIP], ids=str)
def test_merging_counts(share, variant, looks):
    model = clone(variant)
    mustdrop.patch(model, "mustdrop", keep=0.25, merge_share=share)
    inputs = batch(variant, (1, 1))
    logits, kept, _ = answered(model, inputs)
    assert len({len(row[0]) for row in kept}) == 1  # as many enter in every row
    looks(windows=True)  # the rows are looked for on the host, after the same merging
    theirs, same, _ = answered(model, inputs)
    assert kept == same
    assert torch.allclose(logits, theirs, atol=1e-5)


#: What asks the device on the way, by a loop over frames, crops or tokens whose length the data decide.
ASKS = {
    "downsample": "the picture is made smaller on the host",
    "pooling": "cells of distinct shapes are found on the host",
    "fastvid": "a loop over segments",
    "flashvid": "a loop over frames",
    "gleanvid": "a loop over frames",
    "holov": "what a full crop cannot take goes to others, in rounds",
    "h2o": "the cache is cut by what each layer read",
    "snapkv": "likewise",
    "tgvkv": "likewise",
}


STRAIGHT = [name for name in BUDGETED if name not in ASKS]
CENTRED = [name for name in STRAIGHT if "geometry" in recipes()[name].model_fields]


@pytest.mark.parametrize(
    ("name", "knobs"),
    [*((name, {}) for name in STRAIGHT), *((name, {"geometry": "standardized"}) for name in CENTRED)],
    ids=[*STRAIGHT, *(f"{name}-standardized" for name in CENTRED)],
)
def test_nothing_in_a_prompts_pass_depends_on_data(name, knobs, monkeypatch):
    """Tensors without data go through the whole pass: shapes follow from the prompt, and nobody asks for a number."""
    asks_nothing(find(name, keep=16, **knobs), monkeypatch)


@pytest.mark.parametrize("name", CLUSTERS)
def test_no_cluster_depends_on_data(name, monkeypatch):
    asks_nothing(CLUSTERS[name](), monkeypatch)


def skip_if_the_unpatched_model_asks(inputs):
    """In older transformers it looks its placeholders up as it goes."""
    plain = clone(LLAMA)
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            plain(**inputs)
    except DynamicOutputShapeException:
        pytest.skip("the unpatched model of these transformers asks for data itself")


def asks_nothing(method, monkeypatch):
    model = clone(LLAMA)
    mustdrop.patch(model, method)
    inputs = batch(LLAMA, (1, 1))
    with torch.no_grad():
        expected = model(**inputs).logits.shape  # answers are looked at in the first call
    begin = Runtime.begin

    def with_data(self, ids, kwargs):  # the ids come to the host at the start
        with unset_fake_temporarily():
            return begin(self, ids, kwargs)

    monkeypatch.setattr(Runtime, "begin", with_data)
    monkeypatch.setattr(modeling_llava, "torch_compilable_check", lambda *_, **__: None)  # the model's own question
    skip_if_the_unpatched_model_asks(inputs)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        out = model(**inputs)
    assert type(out.logits) is FakeTensor
    assert out.logits.shape == expected
