"""`torch.compile` of a patched model: graph breaks at the hooks, the same numbers."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from support.builders import LLAMA, batch
from support.masking_check import TOLERANCE, distance, patched


@pytest.mark.parametrize("images", [(1,), (1, 2)], ids=str)
def test_a_compiled_model_drops_the_same_tokens_and_gives_the_same_logits(images):
    inputs = batch(LLAMA, images)
    model = patched(LLAMA, "sdpa", "mustdrop", keep=0.4)
    with torch.no_grad():
        expected = model(**inputs).logits
        kept = [mustdrop.trace(model).kept(layer) for layer in range(LLAMA.n_layers + 1)]
        torch.compiler.reset()
        got = torch.compile(model, backend="eager")(**inputs).logits
    assert distance(got, expected) <= TOLERANCE
    again = [mustdrop.trace(model).kept(layer) for layer in range(LLAMA.n_layers + 1)]
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
