"""How long a method takes of a call, apart from the model: scores, decisions, gathers, cuts, and notes for the trace.

All of mustdrop in a patched model is what its `Installation` lists: hooks, capture points, wrappers of methods. While a
call is measured, each of them is clocked, and so is the model's own function inside each wrapper; afterwards they are
the same objects in the same places. Whoever measures nothing pays nothing.

What counts for the method: everything that runs from the entry of a hook, a capture or a wrapper to its end, also
modules of the model that are asked there because of the method alone (its norm before a scorer, its embeddings of the
question). What counts for the model: its own modules, `generate`, and what they do with what the method hands them:
masks that hide padding, positions that skip. So does storing keys and values, which a cache without mustdrop does too.
Cutting them counts for the method.

On a device that queues its work the clock waits at every turn. What ran side by side then runs one after the other, and
both parts take longer than unmeasured: this is a mode to find out the share of the method, and no way to serve.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from mustdrop.clock import now
from mustdrop.errors import ConfigError, NotPatchedError
from mustdrop.patching import _runtime
from mustdrop.runtime.install import Installation
from mustdrop.runtime.session import Runtime

_measured: weakref.WeakSet[Runtime] = weakref.WeakSet()
_lock = threading.Lock()


@dataclass
class TimeSpent:
    """Seconds of a block, in two parts that add up to the whole; they are there when the block has ended.

    Attributes:
        method: in mustdrop's own code.
        model: in all else.
    """

    method: float = 0.0
    model: float = 0.0

    @property
    def whole(self) -> float:
        """Seconds of the block."""
        return self.method + self.model

    @property
    def share(self) -> float:
        """The method's share of the block; 0 where no time has passed."""
        return self.method / self.whole if self.whole else 0.0


@contextmanager
def timed(model: nn.Module, clock: Callable[[], float] | None = None) -> Iterator[TimeSpent]:
    """Tell the time of the method from that of the model, for the calls of `model` in this thread, inside the block.

    One `generate` with `max_new_tokens=1` is a prompt's pass: the whole is then the time to the first token. Call it
    once before: the first call after `patch` makes plans that later ones find made. Patching the model anew, or
    unpatching it, inside the block ends the measurement of its method.

    Args:
        model: a patched model.
        clock: seconds; by default `mustdrop.clock.now`, which waits for every device that the model lies on.

    Yields:
        Two parts, filled in when the block ends, also by an exception.

    Raises:
        NotPatchedError: the model is not patched.
        ConfigError: it is compiled, so that its hooks cannot be told apart, or it is being measured already.
    """
    runtime = _runtime(model)
    if runtime is None:
        raise NotPatchedError(f"this {type(model).__name__} is not patched: call mustdrop.patch(model) first.")
    _refuse_compiled(model, runtime)
    if clock is None:
        clock = _clock_of(runtime.model)
    with _lock:
        if runtime in _measured:
            raise ConfigError("this model is being measured already: measure one call after the other.")
        _measured.add(runtime)
    watch = _Watch(clock)
    try:
        with ExitStack() as undo:
            _clock_hooks(runtime.installation, watch, undo)
            _clock_captures(runtime.installation, watch, undo)
            _clock_wrappers(runtime.installation, watch, undo)
            watch.start()
            try:
                yield watch.spent
            finally:
                watch.stop()
    finally:
        _measured.discard(runtime)


def _clock_of(model: nn.Module) -> Callable[[], float]:
    devices = list(dict.fromkeys(parameter.device for parameter in model.parameters()))
    return lambda: max(map(now, devices))


class _Watch:
    """Gives every moment to the method or to the model, whichever runs; at first it is the model."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.thread = clock, threading.get_ident()
        self.spent = TimeSpent()
        self.since, self.in_method = 0.0, False

    def start(self) -> None:
        self.since, self.in_method = self.clock(), False

    def stop(self) -> None:
        self._settle()

    def turn(self, to_method: bool) -> bool:
        """From now on it is the method's time, or the model's; returns whether it was the method's."""
        before = self.in_method
        if to_method is not before:
            self._settle()
            self.in_method = to_method
        return before

    def around(self, function: Callable[..., Any], method: bool) -> Callable[..., Any]:
        """A function whose time is the method's, or the model's; whoever called it goes on when it ends."""

        @functools.wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                return function(*args, **kwargs)
            before = self.turn(method)
            try:
                return function(*args, **kwargs)
            finally:
                self.turn(before)

        return clocked

    def _settle(self) -> None:
        moment = self.clock()
        if self.in_method:
            self.spent.method += moment - self.since
        else:
            self.spent.model += moment - self.since
        self.since = moment


def _clock_hooks(installation: Installation, watch: _Watch, undo: ExitStack) -> None:
    """Hooks of modules: a clocked one takes the place of each, under its handle and in its turn."""
    for handle in installation.handles:
        hooks = handle.hooks_dict_ref()
        if hooks is None or handle.id not in hooks:  # taken out since, with the module or by hand: it does not run
            continue
        hook = hooks[handle.id]
        hooks[handle.id] = watch.around(hook, method=True)
        undo.callback(_put_back, hooks, handle.id, hook)


def _put_back(hooks: dict[int, Any], key: int, hook: Any) -> None:
    if key in hooks:  # else the model was unpatched inside the block
        hooks[key] = hook


def _clock_captures(installation: Installation, watch: _Watch, undo: ExitStack) -> None:
    """Capture points: the attention itself is the model's, what is read of it afterwards the method's."""
    for module in installation.tapped:
        own = vars(module.config)
        undo.callback(own.__setitem__, "capture", own["capture"])
        own["capture"] = watch.around(own["capture"], method=True)


def _clock_wrappers(installation: Installation, watch: _Watch, undo: ExitStack) -> None:
    """Wrappers of methods stay what and where they are, since others look for them: their class is clocked.

    The function inside, which is the model's, is clocked for the model.
    """
    for _, _, wrapper, _ in installation.overridden:
        kind, function = type(wrapper), wrapper.function
        undo.callback(setattr, wrapper, "__class__", kind)
        undo.callback(setattr, wrapper, "function", function)
        wrapper.__class__ = type(kind.__name__, (kind,), {"__call__": watch.around(kind.__call__, method=True)})
        wrapper.function = _of_model(function, watch)


def _of_model(function: Callable[..., Any], watch: _Watch) -> Callable[..., Any]:
    """A bound method stays one: what is known of it is noted by its function, which must not hold the model."""
    if isinstance(function, MethodType):
        return MethodType(watch.around(function.__func__, method=False), function.__self__)
    return watch.around(function, method=False)


def _refuse_compiled(model: nn.Module, runtime: Runtime) -> None:
    """Compiled code runs no clock."""
    if runtime.engine is not None:
        raise ConfigError(
            "mustdrop.compile runs the prompt's pass as one piece, in which the method cannot be told from the model. "
            "End it with mustdrop.compile(model, graphs=0), or patch the model anew, and measure then."
        )
    compiled = hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in runtime.model.modules())
    if compiled:
        raise ConfigError(
            "torch.compile has compiled this model or a part of it, and compiled code runs no clock. Measure the model "
            "as it was loaded."
        )
