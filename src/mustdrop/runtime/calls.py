"""Which call a pass through the model belongs to. Calls begin and end here, one inside another where they do."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mustdrop import kv
from mustdrop.compat import by_name, cache_of, eager
from mustdrop.runtime import guards
from mustdrop.runtime.call_frames import call_of_module, runs
from mustdrop.runtime.compile import engine
from mustdrop.runtime.compile.decode_steps import compiled_step
from mustdrop.runtime.state import Call, Local, PromptOnHost

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime

#: Modules that a pass goes through, from the outside to the inside.
MODEL, BASE, TEXT = 1, 2, 3


class Calls:
    """Begins and ends the calls of one patched model.

    A pass goes from the model into its base model and from there into the text model. A module that is called while the
    pass is in it, or has been, is called by somebody else (a forward hook): this pass is a call of its own.

    Between the passes of a `generate`, from a logits processor or a stopping criterion, anything may be called. A pass
    belongs to the `generate` if that has prepared its arguments, or if it goes on with the cache of its passes. Any
    other one is a call of its own: another prompt, the unconditional branch of classifier-free guidance. Where nothing
    shows what is prepared (a `custom_generate`, peft's prompt tuning) the call is *loose*: the first pass belongs to it
    in any case, and without a cache those with its media.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @property
    def local(self) -> Local:
        """Run state of this thread."""
        return self.runtime.local

    def enter(self, level: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A module is called: its arguments by name. Begins a call if this pass belongs to none."""
        kwargs = by_name(module.forward, args, kwargs)
        local = self.local
        self.sweep()
        if not self._belongs(level, kwargs):
            self._begin_forward(level, kwargs)
        elif not local.levels and local.call is not None:
            local.call.passes(kwargs)
        if not local.levels:
            local.frame = call_of_module()
        local.levels, local.reached, local.arrived = (*local.levels, level), level, module
        return kwargs

    def leave(self, level: int, kwargs: dict[str, Any], error: BaseException | None = None) -> bool:
        """A module is done, or has failed. Ends the call that began with it; False if it had not been entered."""
        local = self.local
        if local.levels[-1:] != (level,):
            return False
        local.levels, local.arrived = local.levels[:-1], None
        if local.levels:
            return True
        local.reached, local.frame = 0, None
        kv.settle(cache_of(kwargs), failed=error is not None, slices=self.shows_all)
        if local.call is not None and not local.call.generates:
            self.finish(local.call, len(local.aside) - 1, error, silent=level == TEXT)
        elif error is not None:
            local.forward = local.kinds = local.mask = local.encoder = local.capture = local.straight = None
        return True

    def abandon(self, levels: tuple[int, ...], depth: int, kwargs: dict[str, Any], error: BaseException) -> None:
        """An interrupt left a module, and no hook was told: of this module, of those inside it, or of calls inside.

        Args:
            levels: of the module.
            depth: calls that ran when its forward began.
            kwargs: of the forward.
            error: the interrupt.
        """
        local = self.local
        if len(local.aside) > depth:
            local.end(depth)
        for level in levels:
            if level in local.levels:
                local.levels = local.levels[: local.levels.index(level) + 1]
                self.leave(level, kwargs, error)

    def sweep(self) -> None:
        """End the passes that an interrupt in a hook has left, of which nobody was told: see `frames`."""
        local = self.local
        while local.levels and local.frame is not None and not runs(local.frame):
            call, silent = local.call, local.levels[0] == TEXT
            local.levels, local.reached, local.arrived, local.frame = (), 0, None, None
            if call is None or call.generates:
                local.forward = local.kinds = local.mask = local.encoder = local.capture = local.straight = None
                return
            self.finish(call, len(local.aside) - 1, KeyboardInterrupt("interrupted in a hook"), silent)

    def finish(self, call: Call, depth: int, error: BaseException | None = None, silent: bool = False) -> None:
        """End a call with `depth` others around it. The outermost one leaves its trace, or why there is none."""
        self.local.end(depth)
        if call.generates:
            kv.release(call.cache)
        if depth or silent:
            return
        if error is None:
            self.runtime.keep(call)
        else:
            self.runtime.ledger.note(call.began, error=error)

    def prepared(self, arguments: Any) -> None:
        """The `generate` that runs has prepared the arguments of its next pass."""
        call = self.local.call
        if call is not None and call.generates and not self.local.levels and isinstance(arguments, dict):
            call.prepared, call.loose = arguments, False

    def copied(self, ids: Any, mask: Any, arguments: dict[str, Any]) -> None:
        """The arguments of the next pass hold copies of these ids, and this mask or one that is made of it."""
        call = self.local.call
        if call is None or call.looked is None or not call.looked.knows(ids, mask):
            return
        new = arguments.get("input_ids")
        if isinstance(new, Tensor) and new.shape == ids.shape:
            seen = call.looked
            mask = arguments.get("attention_mask")
            call.looked = PromptOnHost(new, mask, seen.kinds, seen.valid, seen.whole, seen.tables)

    @property
    def shows_all(self) -> bool:
        """Whether the pass is one that `generate` has prepared, of a prompt whose mask hides nothing."""
        call = self.local.call
        return call is not None and call.generates and call.shows_all and not self.runtime.method.renumber

    @property
    def encoding(self) -> Call | None:
        """The call whose media are being encoded: in a pass on its way to the text, or by `generate` before the first.

        None if somebody encodes media by hand.
        """
        local = self.local
        call = local.call
        if call is None or local.reached == TEXT or (not local.levels and call.prefill is not None):
            return None
        return call

    def _begin_forward(self, level: int, kwargs: dict[str, Any]) -> None:
        outermost = not self.local.aside
        try:
            if cache_of(kwargs) is not None:
                guards.cache(self.runtime, cache_of(kwargs))
            text = level == TEXT  # by itself it knows of no media: nothing is dropped
            self.local.begin(Call if text else lambda: self.runtime.begin(kwargs.get("input_ids"), kwargs))
        except BaseException as error:
            if outermost:
                self.runtime.ledger.note(0, error=error)
            raise

    def _belongs(self, level: int, kwargs: dict[str, Any]) -> bool:
        """Whether a pass, or the part of it that begins now, belongs to the call that runs."""
        local = self.local
        call = local.call
        if call is None:
            return False
        if local.levels:
            return level > local.reached
        return call.generates and _own(call, kwargs)


def raised(output: Any) -> BaseException | None:
    """What a forward raised that has no output, for hooks that are called in any case."""
    return None if output is not None else sys.exc_info()[1] or RuntimeError("no output")


def _own(call: Call, kwargs: dict[str, Any]) -> bool:
    """Whether a pass between those of a `generate` is one of them."""
    cache, first = cache_of(kwargs), call.prefill is None
    if not first and cache is not call.cache:
        return False
    if not first and cache is not None:
        return True
    if call.prepared is not None:
        return _share(call.prepared, kwargs)
    return call.loose and (first or _share(call.media, kwargs))


def _share(known: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether any tensor, or what was encoded, came under the same name in both, or the same cache."""
    cache = cache_of(known)
    if cache is not None and cache is cache_of(given):
        return True
    return any(isinstance(value, Tensor | dict) and given.get(name) is value for name, value in known.items())


class DirectForward:
    """Stands in for the `forward` of a module whose hooks begin and end calls.

    `module.forward(...)` passes by the hooks: it is led through the module's `__call__`. And what no hook is told of,
    an interrupt, ends the call as well.

    Attributes:
        active: False once it has been taken out; somebody else's wrapper may still hold it.
    """

    active = True

    def __init__(self, calls: Calls, levels: tuple[int, ...], module: nn.Module, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.calls, self.levels, self.module, self.function = calls, levels, module, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, in between its hooks."""
        if not self.active:
            return self.function(*args, **kwargs)
        if args and args[0] is self.module:  # accelerate unwraps a prepared model into a method of what it finds here
            args = args[1:]
        local = self.calls.local
        if torch.compiler.is_compiling():
            straight = TEXT in self.levels and local.straight is not None
            if straight or local.arrived is self.module or compiled_step(local, args, kwargs):
                return self.function(*args, **kwargs)
            return self.module(*args, **kwargs)
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        local = self.calls.local
        arrived, local.arrived = local.arrived, None
        if arrived is not self.module:
            return self.module(*args, **kwargs)
        depth = len(local.aside)
        try:
            if local.straight is not None and TEXT in self.levels:
                return engine.run(self.calls.runtime, self.function, kwargs)
            return self.function(*args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception):
                self.calls.abandon(self.levels, depth, kwargs, error)
            raise


class PrepareWrapper:
    """Stands in for `prepare_inputs_for_generation`: tells which pass `generate` is about to make."""

    def __init__(self, calls: Calls, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.calls, self.function = calls, function

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments of the next pass, as before."""
        arguments = self.function(*args, **kwargs)
        self.calls.prepared(arguments)
        # what is transformers' own copies the ids of a prompt and makes nothing else of them
        if getattr(self.function, "__module__", "").startswith("transformers.") and isinstance(arguments, dict):
            ids = kwargs.get("input_ids", args[0] if args else None)
            self.calls.copied(ids, kwargs.get("attention_mask"), arguments)
        return arguments
