"""Straight passes through `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mustdrop.runtime.compile.engine import Passed, through
from mustdrop.runtime.compile.keyed import Keyed
from mustdrop.runtime.language.straight_pass import Straight

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime

_LIMIT = 1 << 16


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
