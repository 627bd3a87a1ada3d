"""On a device: the same decisions and the same numbers as on the CPU (nox -s gpu)."""

from __future__ import annotations

import pytest
import torch

import mustdrop
from support.builders import LLAMA, SIGLIP, answer, batch
from support.checks import distance, patched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SETTINGS = [
    {"keep": 0.4},
    {"keep": 0.3, "decode_keep": 4, "interval": 2},
    {"global_threshold": 0.02, "individual_threshold": 0.02},
    {"scale": 2.0, "bias": 2.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("variant", [LLAMA, SIGLIP], ids=str)
def test_a_device_gives_the_decisions_and_the_logits_of_the_cpu(variant, settings):
    inputs = batch(variant, (1, 2))
    on_cpu = patched(variant, "sdpa", "mustdrop", **settings)
    on_device = patched(variant, "sdpa", "mustdrop", **settings).to("cuda")
    expected = answer(on_cpu, inputs)
    got = answer(on_device, {name: value.to("cuda") for name, value in inputs.items()})
    ours, theirs = mustdrop.trace(on_device), mustdrop.trace(on_cpu)
    for layer in range(variant.n_layers + 1):
        for sample in range(2):
            assert ours.kept(layer, sample).tolist() == theirs.kept(layer, sample).tolist()
    assert distance(got.logits.cpu(), expected.logits) <= 1e-3
    assert ours.kernels == "triton"


def test_keeping_everything_changes_no_bit_on_a_device():
    inputs = {name: value.to("cuda") for name, value in batch(LLAMA, (1, 2)).items()}
    model = patched(LLAMA, "sdpa", "mustdrop", keep=0.5).to("cuda")
    plain = answer(mustdrop.unpatch(model), inputs)
    kept = answer(mustdrop.patch(model, "mustdrop", keep=1.0), inputs)
    assert torch.equal(plain.logits, kept.logits)
