"""Triton's interpreter, with what it lacks: bfloat16 arithmetic, and the errors that a GPU would not report either.

Import it before triton. Inside `checked`, programs run in random order, an address outside every tensor of the launch
raises, and so does an address that two programs store, or that one stores and another loads. The interpreter itself
computes with the bits of bfloat16 as if they were integers, silently.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


def _is_bits(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(handle: Any) -> Any:
    if not _is_bits(handle):
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _install_arithmetic() -> None:
    binary, dot, reduce = Builder.binary_op, Builder.create_dot, interpreter.ReduceOps.apply_impl

    def binary_op(self, left, right, op):
        if not _is_bits(left):
            made = binary(self, left, right, op)
            # a comparison keeps the type of its operands there, and could then not be a mask
            return Handle(made.data, tl.int1) if made.data.dtype == np.bool_ else made
        out = op(_widened(left).data, _widened(right).data)
        return Handle(out, tl.int1) if out.dtype == np.bool_ else Handle(_rounded(out), tl.bfloat16)

    def create_dot(self, a, b, d, *args, **kwargs):
        return dot(self, _widened(a), _widened(b), d, *args, **kwargs)

    def apply_impl(self, given):
        if any(_is_bits(t.handle) for t in (given if isinstance(given, tuple) else (given,))):
            raise TypeError("a kernel reduces bfloat16: convert to float32 first")
        return reduce(self, given)

    Builder.binary_op, Builder.create_dot = binary_op, create_dot
    interpreter.ReduceOps.apply_impl = apply_impl
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # triton 3.6 makes loop bounds of arrays, which numpy >= 2.4 refuses
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang_tensor = patched


# -- memory -----------------------------------------------------------------------------------------------------------


class _State:
    """What the launch that runs now has touched."""

    on = False
    program = 0
    order: np.ndarray | None = None
    ranges: np.ndarray
    extra: Any
    loads: list[tuple[np.ndarray, int]]
    stores: list[tuple[np.ndarray, int]]


_STATE = _State()


def _spans(values: Any) -> Iterator[tuple[int, int]]:
    """First and last address of every tensor: of the view, not of its storage."""
    for value in values:
        if isinstance(value, tuple | list):
            yield from _spans(value)
        elif hasattr(value, "data_ptr") and value.numel():
            last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
            yield value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


def _touched(pointers: Any, mask: Any, what: str) -> np.ndarray:
    shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
    at = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape).astype(bool)].ravel()
    if not at.size:
        return at
    size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
    first, last = _STATE.ranges[:, 0], _STATE.ranges[:, 1]
    place = np.searchsorted(first, at, side="right") - 1
    reach = np.maximum.accumulate(last)[np.maximum(place, 0)]
    outside = (place < 0) | (at + size > reach)
    if outside.any():
        raise IndexError(f"{what}: {int(outside.sum())} of {at.size} addresses lie in no tensor of the launch")
    return at


def _races() -> None:
    if not _STATE.stores:
        return
    at = np.concatenate([a for a, _ in _STATE.stores])
    by = np.concatenate([np.full(a.size, p) for a, p in _STATE.stores])
    place, inverse = np.unique(at, return_inverse=True)
    low, high = np.full(place.size, 1 << 40), np.full(place.size, -1)
    np.minimum.at(low, inverse, by)
    np.maximum.at(high, inverse, by)
    if (low != high).any():
        raise RuntimeError(f"race: {int((low != high).sum())} addresses are stored by two programs")
    for read, program in _STATE.loads:
        k = np.minimum(np.searchsorted(place, read), place.size - 1)
        if ((place[k] == read) & (low[k] != program)).any():
            raise RuntimeError("race: a program loads what another stores")


def _install_checks() -> None:
    init = interpreter.GridExecutor._init_args_hst
    load, store, index = Builder.create_masked_load, Builder.create_masked_store, Builder.set_grid_idx

    def init_args(self, args, kwargs):
        out = init(self, args, kwargs)
        if _STATE.on:
            _races()  # of the launch before: launches follow one another, programs do not
            _STATE.loads, _STATE.stores, _STATE.order = [], [], None
            spans = sorted({*_spans(args), *_spans(out[0]), *_spans(out[1].values()), *_spans(_STATE.extra)})
            _STATE.ranges = np.array(spans, dtype=np.uint64).reshape(-1, 2)
        return out

    def masked_load(self, pointers, mask, other, *args, **kwargs):
        if _STATE.on:
            _STATE.loads.append((_touched(pointers, mask, "load"), _STATE.program))
            if other is None and not mask.data.all():
                raise ValueError("a masked load does not say what its masked lanes are")
        return load(self, pointers, mask, other, *args, **kwargs)

    def masked_store(self, pointers, value, mask, *args, **kwargs):
        if _STATE.on:
            _STATE.stores.append((_touched(pointers, mask, "store"), _STATE.program))
        return store(self, pointers, value, mask, *args, **kwargs)

    def set_grid_idx(self, x, y, z):
        if _STATE.on:
            nx, ny, nz = self.grid_dim
            if _STATE.order is None or len(_STATE.order) != nx * ny * nz:
                _STATE.order = np.random.default_rng(0).permutation(nx * ny * nz)
            program = _STATE.program = int(_STATE.order[(x * ny + y) * nz + z])
            x, y, z = program // (ny * nz), program // nz % ny, program % nz
        return index(self, x, y, z)

    interpreter.GridExecutor._init_args_hst = init_args
    Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
    Builder.set_grid_idx = set_grid_idx


_install_arithmetic()
_install_checks()


@contextmanager
def checked(extra: Any = ()) -> Iterator[None]:
    """Check every launch inside. `extra`: tensors that kernels reach through a table of addresses."""
    _STATE.on, _STATE.extra, _STATE.loads, _STATE.stores, _STATE.order = True, extra, [], [], None
    try:
        yield
        _races()
    finally:
        _STATE.on = False
