"""Versions, devices, attention backends, kernels, extras."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from mustdrop import extras
from mustdrop.doctor import serving
from mustdrop.kernels import dispatch

# Packages that a patched model works with, and whose versions explain a lot.
AROUND = ("accelerate", "datasets", "flash-attn", "kernels", "lmms-eval", "matplotlib", "peft", "triton")
HUB = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")


def facts() -> dict[str, Any]:
    """Everything about this installation that a report of a problem needs.

    Returns:
        `versions`, `devices`, `attention`, `kernels`, `extras`, `serving` and `hub`: plain values, ready for JSON.
    """
    return {
        "versions": versions(),
        "devices": devices(),
        "attention": attention(),
        "kernels": kernels(),
        "extras": {"required": _lacking(None)} | {name: _lacking(name) for name in extras.names()},
        "serving": serving.facts(),
        "hub": {name: os.environ[name] for name in HUB if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Python, the platform, what this package needs, and what often stands beside it."""
    from mustdrop import __version__

    found = {"mustdrop": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found |= {needed.name: needed.found or "not installed" for needed in extras.requirements()}
    found |= {name: extras.version(name) or found.get(name, "not installed") for name in ("torch", "transformers")}
    return found | {name: extras.version(name) or "not installed" for name in AROUND}


def devices() -> dict[str, str]:
    """Where a model can run: device -> what it is."""
    found = {"cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        found[f"cuda:{i}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {properties.major}."
            f"{properties.minor}, {build}"
        )
    if torch.backends.mps.is_available():
        found["mps"] = "Apple GPU"
    return found


def attention() -> dict[str, str]:
    """Attention implementations of transformers -> whether a patched text model can use them here."""
    from transformers.utils import import_utils

    gpu = torch.cuda.is_available()
    flash = {
        "flash_attention_2": import_utils.is_flash_attn_2_available(),
        "flash_attention_3": import_utils.is_flash_attn_3_available(),
    }
    found = {"eager": "available", "sdpa": "available"}
    for name, installed in flash.items():
        missing = "its package is not installed" if gpu else "needs a GPU"
        found[name] = "available, not for every family" if gpu and installed else f"not available: {missing}"
    flex = import_utils.is_torch_flex_attn_available()
    return found | {"flex_attention": "available, not for every family" if flex else "not available"}


def kernels() -> dict[str, Any]:
    """What scoring, merging, gathering and cutting run as: `asked` for, and per device."""
    found: dict[str, Any] = {"asked": dispatch.chosen()}
    for name in devices():
        device = torch.device(name)
        reason = dispatch.obstacle(device, forced=dispatch.chosen() == "triton")
        if dispatch.chosen() == "reference":
            found[name] = f"reference, because {dispatch.VARIABLE} or use_kernels asks for it"
        elif reason is None:
            found[name] = "triton"
        elif dispatch.chosen() == "triton":
            found[name] = f"an error: triton is asked for, but {reason}"
        else:
            found[name] = f"reference, because {reason}"
    return found


def _lacking(extra: str | None) -> list[str]:
    """What is missing or too old."""
    return [
        f"{needed.name}{needed.wanted} ({f'found {needed.found}' if needed.found else 'not installed'})"
        for needed in extras.requirements(extra)
        if not needed.fits
    ]
