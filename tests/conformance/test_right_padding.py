"""Padding behind a prompt, as in batches with labels: a row keeps, and answers, what it does by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mustdrop
from mustdrop.adapters import registry
from support import families
from support.builders import LLAMA, batch, clone
from support.edges import BUDGETED, refusal, share

FAMILIES = [name for name, adapter in registry().items() if adapter.available()]


def forward(model, inputs):
    """Logits, and which vision tokens every layer of every row kept."""
    with torch.no_grad():
        logits = model(**inputs).logits
    trace = mustdrop.trace(model)
    rows, layers = range(len(trace.total)), range(trace.tokens.shape[0])
    return logits, [[trace.kept(layer, row).tolist() for layer in layers] for row in rows]


@pytest.mark.parametrize("images", [(1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("name", BUDGETED)
def test_every_method(name, images):
    model = mustdrop.patch(clone(LLAMA), name, keep=0.4)
    inputs = batch(LLAMA, images)
    mask = inputs["attention_mask"].bool()
    turned = [torch.cat([own[there], own[~there]]) for own, there in zip(inputs["input_ids"], mask, strict=True)]
    inputs |= {"input_ids": torch.stack(turned), "attention_mask": mask.long().flip(1)}
    together, kept = forward(model, inputs)
    pixels = inputs["pixel_values"].split(list(images))
    for row, length in enumerate(mask.sum(1).tolist()):
        single = {"input_ids": inputs["input_ids"][row : row + 1, :length], "pixel_values": pixels[row]}
        logits, own = forward(model, single)
        assert kept[row] == own[0]
        assert torch.allclose(together[row, :length], logits[0], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    adapter = registry()[name]
    method = next((method for method in ("fastv", "divprune") if not refusal(method, name)), None)
    if method is None:
        pytest.skip("has neither of the stages")
    model = families.clone(name)
    inputs = families.batch(adapter, model, ((next(iter(adapter.media)),),))
    length = inputs["input_ids"].shape[1]
    padded = {key: behind(value, length) for key, value in inputs.items()}
    padded["attention_mask"] = behind(torch.ones_like(inputs["input_ids"]), length)
    padded["input_ids"][:, length:] = inputs["input_ids"][:, -1:]  # hidden by the mask alone
    mustdrop.patch(model, method, keep=share(method, name))
    expected, kept = forward(model, inputs)
    got, own = forward(model, padded)
    assert kept == own
    assert torch.allclose(got[:, :length], expected, atol=1e-5)


def behind(value, length):
    """Four more tokens behind whatever has one entry per token."""
    if isinstance(value, Tensor) and value.ndim == 2 and value.shape[1] == length:
        return torch.nn.functional.pad(value, (0, 4))
    return value
