"""Fixed counts: the device decides what the host would, and how many stay follows from the prompt's shape alone."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from mustdrop.runtime import entry
from mustdrop.runtime.features import FeaturesWrapper
from support.builders import LLAMA, SIGLIP, batch, clone
from support.edges import BUDGETED

PAIRS = [(name, images) for name in BUDGETED for images in ((1, 1), (1, 2))]


@pytest.fixture
def looks(monkeypatch):
    """A switch: from then on the host looks at everything, as where the data decide how many stay."""

    def switch(windows: bool = False) -> None:
        monkeypatch.setattr(entry.fixed, "possible", lambda *_: False)
        if not windows:
            monkeypatch.setattr(FeaturesWrapper, "_counts", lambda *_: None)

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
