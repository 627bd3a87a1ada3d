"""Which implementation runs: Triton on a GPU, the PyTorch reference elsewhere, or what the caller asks for."""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
from collections.abc import Collection
from typing import Literal, cast

import torch

from mustdrop.errors import ConfigError, UnsupportedOptionError

Choice = Literal["auto", "triton", "reference"]
CHOICES = ("auto", "triton", "reference")
VARIABLE = "MUSTDROP_KERNELS"


class _Log(threading.local):
    """What ran in this thread since the current call of a patched model began."""

    def __init__(self) -> None:
        self.ran: set[str] = set()
        self.choice: Choice | None = None  # of the call that runs: the environment takes long to ask


_LOG = _Log()
_forced: list[Choice] = []  # at most one entry: what `use_kernels` said


def use_kernels(choice: Choice) -> None:
    """Choose the implementation of mustdrop's kernels for this process; overrides the variable MUSTDROP_KERNELS.

    Args:
        choice: "auto" (Triton on CUDA and ROCm devices, the reference elsewhere), "triton" or "reference".

    Raises:
        ConfigError: any other word.
        UnsupportedOptionError: "triton" without the package triton. Tensors that Triton cannot take raise later, when
            they come.
    """
    _check(choice, "use_kernels")
    if choice == "triton" and not has_triton():
        raise UnsupportedOptionError("use_kernels('triton'): the package triton is not installed (pip install triton).")
    _forced[:] = [choice]


def chosen() -> Choice:
    """What `use_kernels` or the variable MUSTDROP_KERNELS asks for, "auto" without either."""
    if _forced:
        return _forced[0]
    return _LOG.choice or _asked()


def _asked() -> Choice:
    choice = os.environ.get(VARIABLE, "auto") or "auto"
    _check(choice, VARIABLE)
    return cast(Choice, choice)


def implementation(device: torch.device, floats: Collection[torch.dtype] = ()) -> Literal["triton", "reference"]:
    """What runs for tensors on `device` with these types.

    Raises:
        UnsupportedOptionError: Triton is asked for and cannot run there.
    """
    choice = chosen()
    if choice == "reference" or (choice == "auto" and device.type == "cpu"):
        return "reference"
    reason = obstacle(device, floats, choice == "triton")
    if reason is None:
        return "triton"
    if choice == "triton":
        raise UnsupportedOptionError(f"Triton kernels are asked for, but {reason}: use MUSTDROP_KERNELS=auto.")
    return "reference"


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def fresh_log() -> set[str]:
    """An empty set to which every operation of this thread adds, from now on, what it ran as.

    The environment is asked now which implementation is to run, and not again before `log_to`.
    """
    _LOG.ran, _LOG.choice = set(), _asked()
    return _LOG.ran


def log(kind: str) -> None:
    """Note in this thread what an operation ran as."""
    _LOG.ran.add(kind)


def current_log() -> set[str]:
    """The set to which the operations of this thread add now."""
    return _LOG.ran


def log_to(log: set[str]) -> None:
    """From now on the operations of this thread add to `log` again."""
    _LOG.ran, _LOG.choice = log, None


def obstacle(device: torch.device, floats: Collection[torch.dtype] = (), forced: bool = False) -> str | None:
    """Why Triton cannot run for tensors on `device`, None if it can.

    Args:
        device: of the tensors.
        floats: their floating-point types.
        forced: whether Triton is asked for: then its interpreter will do on a CPU.
    """
    if not has_triton():
        return "the package triton is not installed"
    if torch.float64 in floats:
        return "there are float64 tensors, which the kernels do not take"
    if device.type == "cuda":
        return _gpu_obstacle(device.index or 0)
    if forced and os.environ.get("TRITON_INTERPRET") == "1":  # Triton's interpreter takes tensors of the CPU
        return None
    return f"the tensors are on {device.type!r}, which the kernels do not run on"


@functools.cache
def _gpu_obstacle(index: int) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
        return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0"
    return None


def _check(choice: str, where: str) -> None:
    if choice not in CHOICES:
        raise ConfigError(f"{where}: expected one of {', '.join(CHOICES)}, got {choice!r}.")
