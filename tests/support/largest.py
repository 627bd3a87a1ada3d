"""How large the tensors get that a piece of code makes: a count, so it is the same on every machine."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """The most bytes of any tensor that was made, and the operation that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.made_by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(out):
            if isinstance(made, torch.Tensor) and made.untyped_storage().nbytes() > self.nbytes:
                self.nbytes, self.made_by = made.untyped_storage().nbytes(), f"{func} {tuple(made.shape)}"
        return out
