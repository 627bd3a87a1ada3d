"""Every kernel on a GPU, or in Triton's interpreter where `TRITON_INTERPRET=1` is set (`test_interpreter.py` does)."""

from __future__ import annotations

import os

import pytest
import torch

import mustdrop
from kernels import checks, checks_choices, checks_merging, checks_tokens
from mustdrop.kernels import dispatch
from support.builders import LLAMA, SIGLIP, answer, batch
from support.masking_check import distance, patched

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")
if INTERPRETED:
    from kernels.interpreter import checked

assert all(module.CASES is checks.CASES for module in (checks_choices, checks_merging, checks_tokens))  # now registered
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) if case.slow and INTERPRETED else case for case in checks.CASES],
    ids=lambda case: case.name,
)
def test_kernel(case, monkeypatch):
    monkeypatch.setattr(dispatch, "_forced", ["triton"])
    if not INTERPRETED:
        case.call(DEVICE)
        return
    with checked(checks.made):
        case.call(DEVICE)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        (LLAMA, {"keep": 0.4}),
        (SIGLIP, {"keep": 0.3, "decode_keep": 4, "interval": 2}),
        (LLAMA, {"scale": 2.0, "bias": 2.0}),
    ],
    ids=str,
)
def test_a_model_decides_what_it_decides_with_the_references(variant, settings, monkeypatch):
    inputs = {name: value.to(DEVICE) for name, value in batch(variant, (1, 2)).items()}
    model = patched(variant, "sdpa", "mustdrop", **settings).to(DEVICE)
    traces, logits = [], []
    for choice in ("reference", "triton"):
        monkeypatch.setattr(dispatch, "_forced", [choice])
        logits.append(answer(model, inputs).logits)
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        traces.append(mustdrop.trace(model))
    assert [trace.kernels for trace in traces] == ["reference", "triton"]
    for layer in range(variant.n_layers + 1):
        for sample in range(2):
            assert traces[0].kept(layer, sample).tolist() == traces[1].kept(layer, sample).tolist()
    assert torch.equal(traces[0].kv_lengths, traces[1].kv_lengths)
    assert distance(*logits) <= 1e-4
