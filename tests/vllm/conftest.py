"""vLLM need not be installed: `nox -s vllm` installs it."""

from __future__ import annotations

from pathlib import Path

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
        if WHY is not None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=WHY))
