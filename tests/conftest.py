"""One torch thread per process: workers do not fight over cores, and every sum has one order."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, so it comes first

import torch

torch.set_num_threads(1)

import pytest

from support.versions import BROKEN, TRANSFORMERS


def pytest_collection_modifyitems(items):
    for item in items:
        for family, cause in BROKEN.items():
            if (item.name.partition("[")[2] + "-").startswith((f"{family}-", f"{family}]")):
                item.add_marker(pytest.mark.skip(reason=f"transformers {TRANSFORMERS} cannot run {family}: {cause}"))


def pytest_addoption(parser):
    parser.addoption(
        "--breadth",
        choices=("turns", "more", "product"),
        default="turns",
        help="how much of family x method x attention backend runs: see tests/methods/test_every_family.py",
    )


@pytest.fixture
def flash(monkeypatch):
    """transformers' FlashAttention-2 glue on CPU stand-ins of the kernels; counts the kernel calls."""
    from support import fake_flash

    fake_flash.install(monkeypatch)
    return fake_flash.calls


@pytest.fixture
def flex(monkeypatch):
    """transformers' flex-attention glue without a compiler; counts the calls of the kernel."""
    from support import eager_flex

    eager_flex.install(monkeypatch)
    return eager_flex.calls
