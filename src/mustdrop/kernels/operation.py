"""One decorator makes an operation of its PyTorch reference: registration, shapes, Triton launcher, gradient.

Every operation is registered with torch under `torch.ops.mustdrop`, so `torch.compile`, `torch.export` and fake tensors
know its output shapes and never look inside. `Library.define` and `impl` are used, and not `torch.library.custom_op`
(whose eager call costs several times as much) or `triton_op` (which is decomposed before the device is known, and so
cannot be traced on a machine without a GPU).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from mustdrop.kernels.dispatch import differentiable, implementation, log

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY: Any = torch.library.Library("mustdrop", "DEF")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Operation:
    """What stands behind a function of `mustdrop.kernels`.

    Attributes:
        reference: the PyTorch code that is the specification.
        launches: from the arguments, how many launches the Triton kernel makes.
    """

    reference: Callable[..., Any]
    launches: Callable[..., int]


OPERATIONS: dict[str, Operation] = {}


def operation(
    fake: Callable[..., Any], launcher: str, launches: int | Callable[..., int] = 1, grad: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make an operation of the decorated reference, whose annotations are the schema and whose docstring is the page.

    Args:
        fake: from the arguments of the reference, empty outputs of the right shape.
        launcher: "module:function" below `mustdrop.kernels.triton`, with the arguments of the reference. It is imported
            when it first runs, so `import mustdrop` needs no triton.
        launches: how many the launcher makes, or a function that tells it from the arguments.
        grad: whether a gradient may have to flow; then the reference runs, whose steps autograd knows. The results of
            the others carry none: scores and choices decide, and are no part of what is learned.

    Returns:
        A decorator. What it returns runs Triton or the reference, as `mustdrop.kernels.dispatch` says.
    """
    many = launches if callable(launches) else lambda *_, **__: launches

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        op = _register(reference, fake, launcher)
        OPERATIONS[reference.__name__] = Operation(reference, many)

        @functools.wraps(reference)
        def with_gradient(*args: P.args, **kwargs: P.kwargs) -> R:
            if differentiable(*_tensors([*args, *kwargs.values()])):
                return reference(*args, **kwargs)
            return cast(R, op(*args, **kwargs))

        @functools.wraps(reference)
        def without(*args: P.args, **kwargs: P.kwargs) -> R:
            with torch.no_grad():
                return cast(R, op(*args, **kwargs))

        return with_gradient if grad else without

    return decorate


def _register(reference: Callable[..., Any], fake: Callable[..., Any], launcher: str) -> Any:
    name = reference.__name__
    module, function = launcher.split(":")

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = _tensors([*args, *kwargs.values()])
        floats = tuple({t.dtype for t in tensors if t.is_floating_point()})
        kind = implementation(tensors[0].device, floats)
        log(kind)
        if kind == "reference":
            return reference(*args, **kwargs)
        launch = getattr(importlib.import_module(f"mustdrop.kernels.triton.{module}"), function)
        with _on(tensors[0].device):
            return launch(*args, **kwargs)

    schema = torch.library.infer_schema(reference, mutates_args=())
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mustdrop::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.mustdrop, name).default


def _on(device: torch.device) -> Any:
    """Triton launches on the current device; a model may be spread over several."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


def _tensors(values: list[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [part for part in value if isinstance(part, Tensor)]
    return found
