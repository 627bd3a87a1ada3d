"""One call of an attention function, and what the kernels read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mustdrop import kernels
from mustdrop.runtime import tensor_parallel
from mustdrop.runtime.masks import visible_keys
from mustdrop.runtime.masks_flex import Mask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


#: Rows x keys of a mask that may exist at once, in elements, where all rows of a prompt are read.
AT_ONCE = 1 << 25


Sight = tuple[Tensor, Tensor | None]  # what `visible_keys` gives


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function.

    Attributes:
        q: (B, H, n, D) queries.
        k: (B, G, K, D) keys of the filled slots.
        mask: what the function got, cut to these slots.
        scaling: factor on the logits.
        softcap: see `mustdrop.kernels.row_probabilities`.
        group: processes that share the heads in tensor parallel, else None.
        seen: (B, R, K) bool, keys that the rows to be read see, where that is known; None: the mask says it.
        given: the mask as the function got it.
    """

    q: Tensor
    k: Tensor
    mask: Mask
    scaling: float
    softcap: float | None
    group: ProcessGroup | None = None
    seen: Tensor | None = None
    given: Mask = None

    @classmethod
    def of(
        cls, module: nn.Module, q: Tensor, k: Tensor, mask: Mask, kwargs: dict[str, Any], stored: int | None
    ) -> AttentionCall:
        """From the arguments of the function; `stored` slots of `k` are filled (None: all)."""
        given = mask
        if stored is not None:  # a static cache hands out room for later tokens too
            k, mask = k[:, :, :stored], mask[..., :stored] if isinstance(mask, Tensor) else mask
        scaling = kwargs.get("scaling") or getattr(module, "scaling", None) or q.shape[-1] ** -0.5
        group = tensor_parallel.group_of(module)
        return cls(q, k, mask, scaling, kwargs.get("softcap"), group, given=given)

    def arguments(self, rows: Tensor, first: int = 0, sight: Sight | None = None) -> tuple[Any, ...]:
        """Arguments of the kernels that read query rows (B, R), -1 on padding; keys before `first` give no result."""
        bias, visible = None, self.seen
        if sight is not None:
            visible, bias = sight
        elif visible is None:
            visible, bias = visible_keys(rows, self.mask, self.q.shape[2], self.k.shape[2])
        return self.q, self.k, rows, visible, self.scaling, bias, self.softcap, first

    def over_heads(self, x: Tensor) -> Tensor:
        """A mean over the heads that are here as the mean over all heads."""
        return tensor_parallel.mean_over_heads(x, self.group)

    def probabilities(self, rows: Tensor, first: int) -> Tensor:
        """(B, R, K - first) head-mean attention of query rows (B, R)."""
        return self.over_heads(kernels.row_probabilities(*self.arguments(rows, first)))

    def statistics(self, rows: Tensor, first: int) -> Tensor:
        """(B, 2, K - first) sum and maximum of it over the rows."""
        if self.group is None:
            return kernels.text_statistics(*self.arguments(rows, first))
        # the maximum is one of the mean over all heads, so the rows must be there when the processes meet
        total = self.q.new_zeros(rows.shape[0], self.k.shape[2] - first, dtype=torch.float32)
        peak = total
        for part in torch.split(rows, self.at_once(rows), dim=1) if rows.shape[1] else ():
            given = self.probabilities(part, first)
            total, peak = total + given.sum(1), torch.maximum(peak, given.amax(1))
        return torch.stack([total, peak], 1)

    def at_once(self, rows: Tensor) -> int:
        """How many of the rows (B, R) may meet the keys at once."""
        return max(1, AT_ONCE // max(1, rows.shape[0] * self.k.shape[2]))
