"""Straight passes compiled by `torch.compile`, or recorded once for each shape and replayed."""

from __future__ import annotations

import abc
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop import kv
from mustdrop.errors import UnsupportedOptionError
from mustdrop.kernels.dispatch import chosen, current_log, fresh_log, log_to
from mustdrop.runtime.compile.engine import Engine, Passed, through
from mustdrop.runtime.compile.nested import apart, together
from mustdrop.runtime.compile.recording import Captured, Capturer
from mustdrop.runtime.compile.watch import Watch
from mustdrop.runtime.language.straight_pass import Straight

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime

_COUNTED = 1024  # shapes whose prompts are counted
_LIMIT = 1 << 16
_SMALL = 1 << 18  # entries of a table that is held to be known again


def key_of(straight: Straight, kwargs: dict[str, Any], tensors: list[Tensor]) -> Hashable:
    """Everything that a pass depends on but the values of `tensors`, which are appended, and what `Watch` watches.

    Raises:
        UnsupportedOptionError: it depends on something that has no form.
    """
    form = apart([kwargs, straight.facts()], tensors)
    return form, straight.inner is None, tuple(straight.functions.items()), _surroundings(straight)


def _surroundings(straight: Straight) -> Hashable:
    """Switches of torch and of mustdrop that decide which kernels run, and in which type."""
    device = straight.vision.device.type
    cuda: Any = torch.backends.cuda
    return (
        straight.runtime.implementation,
        chosen(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        *(getattr(cuda, f"{kernel}_sdp_enabled")() for kernel in ("flash", "mem_efficient", "math", "cudnn")),
    )


def obstacle(straight: Straight) -> str | None:
    """Why a pass cannot be compiled or recorded now, None if it can."""
    if torch.is_grad_enabled():
        return "gradients are wanted: run it under torch.no_grad() (generate does)"
    if straight.runtime.text.training:
        return "the model is in training mode: call model.eval()"
    return None


class Keyed(Engine):
    """Runs passes by what was made for their key; the first `after - 1` of each key, and what has none, as they are.

    Attributes:
        graphs: how many keys there may be something for.
        after: the time of its coming at which a key gets it.
        refused: keys for which it could not be made.
        counts: how often each key has come, of the newest ones.
    """

    def __init__(self, runtime: Runtime, graphs: int, after: int) -> None:
        super().__init__()
        self.runtime, self.graphs, self.after = runtime, graphs, after
        self.refused: set[Hashable] = set()
        self.counts: OrderedDict[Hashable, int] = OrderedDict()
        self.lock = threading.Lock()
        self.watch: Watch | None = None

    def run(self, straight: Straight, function: Callable[..., Any], kwargs: dict[str, Any]) -> Passed:
        """See `through`."""
        tensors = list[Tensor]()
        why = obstacle(straight)
        if why is not None:
            self.say(why)
            return through(straight, function, kwargs)
        try:
            key = key_of(straight, kwargs, tensors)
        except UnsupportedOptionError as error:
            self.say(str(error))
            return through(straight, function, kwargs)
        with self.lock:
            made = self._made(key, tensors, straight, function, kwargs) if self._is_due(key) else None
        return through(straight, function, kwargs) if made is None else made

    @abc.abstractmethod
    def _made(
        self,
        key: Hashable,
        tensors: Sequence[Tensor],
        straight: Straight,
        function: Callable[..., Any],
        kwargs: dict[str, Any],
    ) -> Passed | None:
        """The pass by what is there for its key, or is made now; None if it cannot be."""

    def _is_due(self, key: Hashable) -> bool:
        if key in self.refused:
            return False
        times = self.counts.pop(key, 0) + 1
        self.counts[key] = times
        if len(self.counts) > _COUNTED:
            self.counts.popitem(last=False)
        return times >= self.after

    def _refuse(self, key: Hashable, error: Exception) -> None:
        if len(self.refused) >= _COUNTED:
            self.refused.clear()
        self.refused.add(key)
        first = (str(error).strip() or "no message").splitlines()[0]
        self.say(f"it could not be captured ({type(error).__name__}: {first})")


class Compiled(Keyed):
    """Passes through `torch.compile`: one graph for each shape."""

    def __init__(self, runtime: Runtime, backend: Any, graphs: int, after: int) -> None:
        super().__init__(runtime, graphs, after)
        self.backend, self.known = backend, set[Hashable]()
        self.function = torch.compile(through, fullgraph=True, dynamic=False, backend=backend)

    def again(self, runtime: Runtime) -> Compiled:
        """See `Engine.again`."""
        return Compiled(runtime, self.backend, self.graphs, self.after)

    def release(self) -> None:
        """See `Engine.release`. What `torch.compile` holds goes with `torch.compiler.reset()`."""
        self.known.clear()

    def _made(
        self,
        key: Hashable,
        tensors: Sequence[Tensor],
        straight: Straight,
        function: Callable[..., Any],
        kwargs: dict[str, Any],
    ) -> Passed | None:
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException

        if key not in self.known and len(self.known) >= self.graphs:
            self.say(f"as many shapes are compiled as graphs={self.graphs} allows")
            return None
        self.known.add(key)
        try:
            with config.patch(recompile_limit=_LIMIT, accumulated_recompile_limit=_LIMIT):  # `graphs` is the bound
                made: Passed = self.function(straight, function, kwargs)
        except TorchDynamoException as error:  # while it was traced: nothing has run
            self.known.discard(key)
            self._refuse(key, error)
            return None
        return made


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
