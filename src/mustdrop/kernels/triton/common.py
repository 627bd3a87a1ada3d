"""What the launchers share.

Rules for the kernels, which must run on every triton from 3.6 on:

- every masked load that is used says what masked lanes are (`other=`); no arithmetic on bfloat16 outside `tl.dot`;
- 64-bit offsets only in the scalar base of a block, since an int64 block costs registers;
- no atomics: each output has one owner, so results are the same bit for bit from run to run;
- fp fusion is asked for by name, since triton 3.10 turns it off otherwise.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from packaging.version import Version
from torch import Tensor

LOG2E = 1.4426950408889634
FUSED: dict[str, Any] = {"enable_fp_fusion": True}
# From triton 3.8 on the same tiles take more registers: what was at the limit before gets smaller ones, or more warps.
TIGHT = Version(triton.__version__) >= Version("3.8")


def p2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


@functools.cache
def _cores(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def cores(device: torch.device) -> int:
    """Multiprocessors of the device; those of an H100 where there is none (interpreter, compilation ahead of time)."""
    return _cores(device.index or 0) if device.type == "cuda" else 132


@functools.cache
def _roomy(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (9, 0)


#: What `roomy` says where there is no device; compilation ahead of time sets it to what it compiles for.
assumed = {"roomy": True}


def roomy(device: torch.device) -> bool:
    """Whether the largest tiles fit into registers: on NVIDIA from compute capability 9.0; before it, they spill."""
    return _roomy(device.index or 0) if device.type == "cuda" else assumed["roomy"]


def precision(x: Tensor) -> str:
    """How `tl.dot` multiplies: float32 stays float32, since TF32 would change which tokens are kept."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def plain(x: Tensor) -> Tensor:
    """`x` with neighbouring elements in its last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def unit(*tensors: Tensor) -> int:
    """The largest power of two up to 16 that divides every stride but the last.

    Kernels get strides in this unit, and multiply: triton itself only knows of strides that 16 divides, and at a head
    dimension of 72 it would load element by element.
    """
    size = 16
    while any(step % size for x in tensors for step, n in zip(x.stride()[:-1], x.shape, strict=False) if n > 1):
        size //= 2
    return size


def broadcast(x: Tensor) -> list[int]:
    """Strides, zero where there is one entry for all."""
    return [step if n > 1 else 0 for step, n in zip(x.stride(), x.shape, strict=True)]


@triton.jit
def base2(dots, scale, cap, CAPPED: tl.constexpr):
    """Logits in base 2. Without a cap, `scale` holds log2(e) already; with one, it is the tanh that is scaled."""
    if CAPPED:
        # tanh(x) = 1 - 2 / (1 + e^2x); there is no tanh outside of libdevice
        return cap * (1.0 - 2.0 / (1.0 + tl.exp2(dots * scale)))
    else:
        return dots * scale


@triton.jit
def combined(parts, splits, stride, real, N: tl.constexpr):
    """Log-sum-exp over the splits of the keys; +inf for rows that see nothing, so that their probabilities are zero."""
    top = tl.full((N,), float("-inf"), tl.float32)
    total = tl.zeros((N,), tl.float32)
    for s in range(splits):
        x = tl.load(parts + s * stride, mask=real, other=float("-inf"))
        high = tl.maximum(top, x)
        safe = tl.where(high == float("-inf"), 0.0, high)
        total = total * tl.exp2(top - safe) + tl.exp2(x - safe)
        top = high
    return tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("inf"))


def scales(scaling: float, softcap: float | None) -> tuple[float, float, bool]:
    """The arguments (scale, cap, CAPPED) of `base2`."""
    if softcap is None:
        return scaling * LOG2E, 0.0, False
    return 2 * scaling / softcap * LOG2E, softcap * LOG2E, True
