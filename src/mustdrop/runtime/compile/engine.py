"""How a straight pass is run: as it is, compiled, or replayed from a recording (`mustdrop.compile`)."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mustdrop import kv
from mustdrop.compat import CACHE_NAMES, give_cache
from mustdrop.errors import CaptureWarning, warn
from mustdrop.runtime.language.vision_tokens import VisionTokens
from mustdrop.runtime.state import Forward

if TYPE_CHECKING:
    from mustdrop.runtime.language.straight_pass import Straight
    from mustdrop.runtime.session import Runtime

#: The text model's output, and (B, S, C) hidden states of all tokens.
Passed = tuple[Any, Tensor]


class Engine(abc.ABC):
    """Runs the straight passes of one patched model."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    @abc.abstractmethod
    def run(self, straight: Straight, function: Callable[..., Any], kwargs: dict[str, Any]) -> Passed:
        """See `through`."""

    @abc.abstractmethod
    def again(self, runtime: Runtime) -> Engine:
        """One with the same settings for another patched model; it has recorded nothing."""

    @abc.abstractmethod
    def release(self) -> None:
        """Give back what was recorded."""

    def say(self, why: str) -> None:
        """Warn once for each reason why a pass runs as it is."""
        if why not in self.said:
            self.said.add(why)
            warn(f"mustdrop.compile: a prompt's pass runs as without it: {why}.", CaptureWarning)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a model has recorded nothing; `Runtime` makes its engine anew."""
        return


class Plain(Engine):
    """Runs straight passes as they are."""

    def run(self, straight: Straight, function: Callable[..., Any], kwargs: dict[str, Any]) -> Passed:
        """See `through`."""
        return through(straight, function, kwargs)

    def again(self, runtime: Runtime) -> Plain:
        """See `Engine.again`."""
        return Plain()

    def release(self) -> None:
        """There is nothing."""


def ready(runtime: Runtime, forward: Forward, media: VisionTokens | None) -> Straight | None:
    """The straight pass that comes now, over a cache of its own; None where it cannot be one."""
    from mustdrop.runtime.language import straight_plan  # here: most patched models run no pass straight

    why = straight_plan.why_not(runtime, forward, media)
    if why is not None:
        if runtime.engine is not None:
            runtime.engine.say(why)
        return None
    assert media is not None, "a pass without media"
    device = next(runtime.text.parameters()).device
    straight = straight_plan.straight_of(runtime, forward, media, device)
    straight.inner = None if forward.cache is None else kv.inner(runtime.text.config, runtime.depth)
    return straight


def through(straight: Straight, function: Callable[..., Any], kwargs: dict[str, Any]) -> Passed:
    """The text model's own forward between the two ends of a straight pass."""
    given = {**kwargs, "inputs_embeds": straight.arrive(kwargs["inputs_embeds"])}
    if straight.inner is not None:
        give_cache(given, straight.inner, straight.runtime.cache_name)
    output = function(**given)
    return output, straight.leave(output.last_hidden_state)


def run(runtime: Runtime, function: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """The pass that `ready` has made ready: the output of the text model, as the caller expects it."""
    local, engine = runtime.local, runtime.engine
    straight, forward, call = local.straight, local.forward, local.call
    assert straight is not None, "a pass that is not straight"
    assert forward is not None, "a pass that is not straight"
    assert engine is not None, "nobody asked for straight passes"
    given = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    mask = given.get("attention_mask")
    if call is not None and call.looked is not None and call.looked.whole and getattr(mask, "ndim", 0) == 2:
        given["attention_mask"] = None  # it hides nothing, as the host knows and a recording could not ask
    elif mask is not None:
        given["attention_mask"] = straight.columns(mask)
    output, hidden = engine.run(straight, function, given)
    output.last_hidden_state = hidden
    landed(runtime, straight, forward, output)
    return output


def landed(runtime: Runtime, straight: Straight, forward: Forward, output: Any) -> None:
    """A straight pass has ended: everything is noted, and `output` names the caller's cache."""
    from mustdrop.runtime.language import straight_record  # as `straight_plan`

    assert forward.media is not None, "a pass without media"
    runtime.local.straight = None
    straight_record.land(straight, forward, forward.media, straight.inner, runtime.local.call)
    forward.landed = True
    for name in CACHE_NAMES:
        if straight.inner is not None and getattr(output, name, None) is straight.inner:
            setattr(output, name, forward.cache)
