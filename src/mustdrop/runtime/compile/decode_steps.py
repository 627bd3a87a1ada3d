"""Decode steps inside `torch.compile`: which hooks a compiler may see.

A prompt decides which tokens stay, so its hooks keep out of compiled code. A decode step over a static cache decides
nothing: all but the hooks of the decoder layers have nothing to do there, and those only map the mask. So such a step
compiles into one graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from mustdrop import kv
from mustdrop.compat import eager
from mustdrop.runtime.state import Local


def compiled_step(local: Local, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call is being compiled and is a decode step over a static cache.

    Args:
        local: run state of this thread; a pass that is under way and was begun outside of compiled code has its own
            hooks.
        args: positional arguments of a top, base or text model, or of a decoder layer.
        kwargs: its keyword arguments.
    """
    if not torch.compiler.is_compiling() or local.forward is not None or local.kinds is not None:
        return False
    if any(value is not None for name, value in kwargs.items() if name.startswith("pixel_values")):
        return False
    return not kwargs.get("mm_encoder_outputs") and kv.is_step(args, kwargs)


def outside_steps(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a hook out of `torch.compile`, and leave it out of compiled decode steps altogether.

    Args:
        hook: method of an object that has a `local`; called with (module, args, kwargs) and, after a forward, the
            output.
    """
    kept_out = eager(hook)

    @functools.wraps(hook)
    def either(self: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        if compiled_step(self.local, args, kwargs):
            return None
        return kept_out(self, module, args, kwargs, *output)

    return either
