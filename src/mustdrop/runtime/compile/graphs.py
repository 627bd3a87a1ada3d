"""Straight passes recorded once for each shape, and replayed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop import kv
from mustdrop.kernels.dispatch import current_log, fresh_log, log_to
from mustdrop.runtime.compile.engine import Passed, through
from mustdrop.runtime.compile.keyed import Keyed
from mustdrop.runtime.compile.nested import apart, together
from mustdrop.runtime.compile.recording import Captured, Capturer
from mustdrop.runtime.compile.watch import Watch
from mustdrop.runtime.language.straight_pass import Straight

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime

_SMALL = 1 << 18  # entries of a table that is held to be known again


@dataclass
class Recorded:
    """A pass that was recorded.

    Attributes:
        inputs: on which a replay runs.
        sources: where what they hold has come from, with its version; None where that is not known.
        captured: the recording.
        form: of its outputs.
        output: type of the text model's output.
        cache: names under which that holds the cache.
        kernels: which implementations ran.
    """

    inputs: list[Tensor]
    sources: list[tuple[Tensor, int] | None]
    captured: Captured
    form: Any
    output: type
    cache: list[str]
    kernels: set[str]

    def feed(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors into the inputs; tables that lie there already are not copied again."""
        for i, (own, new) in enumerate(zip(self.inputs, tensors, strict=True)):
            source = self.sources[i]
            known = None if new.is_inference() else new._version
            if source is not None and source[0] is new and source[1] == known:
                continue
            own.copy_(new)
            self.sources[i] = None if known is None or new.numel() > _SMALL else (new, known)


class Graphs(Keyed):
    """Passes that were recorded once for each key, on inputs of our own, and are replayed.

    Attributes:
        recorded: by key, the one that was used last at the end.
    """

    def __init__(self, runtime: Runtime, capturer: Callable[[], Capturer], graphs: int, after: int) -> None:
        super().__init__(runtime, graphs, after)
        self.make, self.capturer = capturer, capturer()
        self.recorded: OrderedDict[Hashable, Recorded] = OrderedDict()

    def again(self, runtime: Runtime) -> Graphs:
        """See `Engine.again`."""
        return Graphs(runtime, self.make, self.graphs, self.after)

    def release(self) -> None:
        """See `Engine.release`."""
        self.recorded.clear()
        self.capturer, self.watch = self.make(), None

    def _made(
        self,
        key: Hashable,
        tensors: Sequence[Tensor],
        straight: Straight,
        function: Callable[..., Any],
        kwargs: dict[str, Any],
    ) -> Passed | None:
        if self.runtime.recurrent:
            self.say("its recurrent layers keep states that a recording would share")
            return None
        if self.watch is None or not self.watch.unchanged():  # what was recorded is of another model, so to speak
            self.recorded.clear()
            self.watch = Watch(self.runtime.text)
        if self.watch.away:
            self.say("weights of its language model come to the device while it runs")
            return None
        recorded = self.recorded.pop(key, None)
        if recorded is None:
            while len(self.recorded) >= self.graphs:
                self.recorded.popitem(last=False)
            try:
                recorded = self._record(tensors, straight, function, kwargs)
            except Exception as error:
                self._refuse(key, error)
                return None
        self.recorded[key] = recorded
        return _replayed(recorded, tensors, straight)

    def _record(
        self, tensors: Sequence[Tensor], straight: Straight, function: Callable[..., Any], kwargs: dict[str, Any]
    ) -> Recorded:
        """Record the pass on copies of its inputs."""
        form = apart([kwargs, straight.facts()], [])
        found: dict[str, Any] = {}
        local, log = self.runtime.local, current_log()

        def run(inputs: Sequence[Tensor]) -> list[Tensor]:
            given, facts = together(form, iter(inputs))
            local.straight = scratch = straight.like(facts)
            if straight.inner is not None:
                scratch.inner = kv.inner(self.runtime.text.config, self.runtime.depth)
            output, hidden = through(scratch, function, given)
            made = list[Tensor]()
            found["form"] = apart(_outputs(scratch, output, hidden), made)
            found["output"] = type(output)
            found["cache"] = [name for name, value in output.items() if value is scratch.inner]
            return made

        with torch.inference_mode(False), torch.no_grad():
            inputs = [x.detach().clone() for x in tensors]
        try:
            kinds = fresh_log()
            captured = self.capturer.capture(run, inputs)
        finally:
            local.straight = straight
            log_to(log)
        return Recorded(inputs, [None] * len(inputs), captured, found["form"], found["output"], found["cache"], kinds)


def _outputs(straight: Straight, output: Any, hidden: Tensor) -> list[Any]:
    """Hidden states, what became of the rows, the entries of the cache, and whatever else the text model gave."""
    layers = [] if straight.inner is None else straight.inner.layers
    entries = [None if layer.keys is None else (layer.keys, layer.values) for layer in layers]
    rest = {
        name: value
        for name, value in output.items()
        if name != "last_hidden_state" and (straight.inner is None or value is not straight.inner)
    }
    return [hidden, list(straight.history), entries, rest]


def _replayed(recorded: Recorded, tensors: Sequence[Tensor], straight: Straight) -> Passed:
    """Replay on these inputs; what comes of it is copied, since the next replay overwrites it."""
    recorded.captured.begin()
    recorded.feed(tensors)
    made = recorded.captured.replay()
    fresh = [torch.empty_like(x) for x in made]
    torch._foreach_copy_(fresh, list(made))
    recorded.captured.end()
    current_log().update(recorded.kernels)
    hidden, straight.history, entries, rest = together(recorded.form, iter(fresh))
    straight.left = True
    if straight.inner is not None:
        for layer, own in zip(straight.inner.layers, entries, strict=True):
            layer.keys, layer.values = (None, None) if own is None else own
        rest |= dict.fromkeys(recorded.cache, straight.inner)
    return recorded.output(last_hidden_state=hidden, **rest), hidden
