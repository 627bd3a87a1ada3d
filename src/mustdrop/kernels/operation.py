"""One decorator makes an operation of its PyTorch reference: registration, shapes, Triton launcher, gradient.

Every operation is registered with torch under `torch.ops.mustdrop`, so `torch.compile`, `torch.export` and fake tensors
know its output shapes and never look inside. `Library.define` and `impl` are used, and not `torch.library.custom_op`
(whose eager call costs several times as much) or `triton_op` (which is decomposed before the device is known, and so
cannot be traced on a machine without a GPU). Where nobody looks at operations, the call goes past torch's dispatcher,
which takes as long as ten small operations.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from mustdrop.kernels.dispatch import implementation, log

P = ParamSpec("P")
R = TypeVar("R")

LIBRARY: Any = torch.library.Library("mustdrop", "DEF")  # type: ignore[no-untyped-call]


@dataclass
class Operation:
    """What stands behind a function of `mustdrop.kernels`.

    Attributes:
        reference: the PyTorch code that is the specification.
        launches: from the arguments, how many launches the Triton kernel makes.
        on_host: the same results in less time, for tensors of the host (`mustdrop.kernels.on_host`).
    """

    reference: Callable[..., Any]
    launches: Callable[..., int]
    on_host: Callable[..., Any] | None = None


OPERATIONS: dict[str, Operation] = {}

_OWN = (Tensor, torch.nn.Parameter)
_function_modes = torch._C._len_torch_function_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_profiled = torch.autograd._profiler_enabled  # type: ignore[attr-defined]


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
        known = OPERATIONS[reference.__name__] = Operation(reference, many)
        run = _implementations(known, launcher)
        op = _register(reference, fake, run)

        @functools.wraps(reference)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return cast(R, op(*args, **kwargs))
            tensors = _tensors([*args, *kwargs.values()])
            passes_by = _passes_by(tensors)
            if not torch.is_grad_enabled():
                return cast(R, run(tensors, args, kwargs) if passes_by else op(*args, **kwargs))
            if grad and any(t.requires_grad for t in tensors):
                return reference(*args, **kwargs)
            with torch.no_grad():
                return cast(R, run(tensors, args, kwargs) if passes_by else op(*args, **kwargs))

        return call

    return decorate


def _passes_by(tensors: list[Tensor]) -> bool:
    """Whether nobody is told of operations: no mode, no profiler, no tensor of a kind of its own."""
    if _function_modes() or _dispatch_modes() or _profiled():
        return False
    return all(type(t) in _OWN for t in tensors)


def _implementations(known: Operation, launcher: str) -> Callable[..., Any]:
    """What runs: called with all tensors, the arguments, and those by name."""
    module, function = launcher.split(":")

    def run(tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        device = tensors[0].device
        kind = implementation(device, {t.dtype for t in tensors})
        log(kind)
        if kind == "reference":
            own = known.on_host if device.type == "cpu" else None
            return (known.reference if own is None else own)(*args, **kwargs)
        launch = getattr(importlib.import_module(f"mustdrop.kernels.triton.{module}"), function)
        with _on(device):
            return launch(*args, **kwargs)

    return run


def _register(reference: Callable[..., Any], fake: Callable[..., Any], run: Callable[..., Any]) -> Any:
    name = reference.__name__
    schema = torch.library.infer_schema(reference, mutates_args=())
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))

    def dispatched(*args: Any, **kwargs: Any) -> Any:
        return run(_tensors([*args, *kwargs.values()]), args, kwargs)

    LIBRARY.impl(name, dispatched, "CompositeExplicitAutograd")
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
        elif isinstance(value, (list, tuple)):
            found += [part for part in value if isinstance(part, Tensor)]
    return found
