"""Every kernel on a GPU, or in Triton's interpreter where `TRITON_INTERPRET=1` is set (`test_interpreter.py` does)."""

from __future__ import annotations

import os

import pytest
import torch

from kernels import checks
from mustdrop.kernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")
if INTERPRETED:
    from kernels.interpreter import checked

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
