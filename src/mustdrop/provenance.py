"""Where a figure comes from: versions, hardware, commit. Every result file carries it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("mustdrop", "torch", "transformers")


def provenance(seed: int) -> dict[str, Any]:
    """Versions, hardware, seed, date, commit and whether the tree was dirty (None outside a checkout of mustdrop).

    Result files are no part of what is measured: those of an earlier benchmark make no tree dirty.
    """
    root = Path(__file__).parents[2]
    commit = _git(root, "rev-parse", "HEAD") if (root / "pyproject.toml").exists() else None
    others = (".", ":(exclude)benchmarks/results")
    status = _git(root, "status", "--porcelain", "--untracked-files=no", "--", *others) if commit else None
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "hardware": _hardware(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit,
        "dirty": None if status is None else bool(status),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _hardware() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    text = f"{name}, {os.cpu_count()} cores"
    return f"{text}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else text


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
