"""vLLM need not be installed: `nox -s vllm` installs it."""

from __future__ import annotations

import os

import pytest

from mustdrop.doctor.serving import installed
from mustdrop.integrations.vllm import SUPPORTED, supported

VERSION = installed()
WHY = None
if VERSION is None:
    WHY = "vLLM is not installed (nox -s vllm installs it)"
elif not supported(VERSION):
    WHY = f"vLLM {VERSION} is not in {SUPPORTED}"


def pytest_collection_modifyitems(items):
    for item in items:
        if WHY is not None and os.path.dirname(__file__) in str(item.path):
            item.add_marker(pytest.mark.skip(reason=WHY))
