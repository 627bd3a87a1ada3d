"""What a patched model carries is copied with the model, and not written to a file."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from mustdrop.errors import PatchedModelError

T = TypeVar("T")


class Copied:
    """Base of what goes along in `copy.deepcopy` and stops `pickle`, with a word on what to do."""

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PatchedModelError(
            "a patched model cannot be pickled (pickle, torch.save(model), multiprocessing): what was put "
            "into it stays in this process. Call mustdrop.unpatch(model) first and patch again after loading; "
            "model.save_pretrained(...), torch.save(model.state_dict(), ...) and copy.deepcopy(model) work as they are."
        )
