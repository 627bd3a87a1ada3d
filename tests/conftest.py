"""One torch thread per process: workers do not fight over cores, and every sum has one order."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, so it comes first

import torch

torch.set_num_threads(1)

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--every-backend", action="store_true", help="every method on every family under every attention backend"
    )


@pytest.fixture
def flash(monkeypatch):
    """transformers' FlashAttention-2 glue on CPU stand-ins of the kernels; counts the kernel calls."""
    from support import fake_flash

    fake_flash.install(monkeypatch)
    return fake_flash.calls
