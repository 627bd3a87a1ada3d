"""Linear layers whose weights are laid out for the processor once, not at every call.

A matrix library copies the weights into its own layout at each product. That costs the same for 80 rows as for 640, so
it eats up a part of what shorter prompts save. Frozen models that serve on a CPU do not pay it (`torch.compile` with
`freezing` packs in the same way): this is the same step, for eager models and for both sides of a comparison.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """A `Linear` that multiplies with a packed copy of its weights; the weights themselves stay to be looked at."""

    packed: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> PackedLinear:
        """The packed form of a float32 layer on the CPU."""
        out = cls.__new__(cls)
        nn.Module.__init__(out)
        out.in_features, out.out_features = linear.in_features, linear.out_features
        out.weight, out.bias = linear.weight, linear.bias
        out.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        return out

    def forward(self, input: Tensor) -> Tensor:
        """As `Linear.forward`, without gradients."""
        made: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")
        return made


def pack(model: nn.Module) -> int:
    """Pack every linear layer of a float32 model on the CPU; returns how many."""
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear
    ]
    for module, name, linear in found:
        setattr(module, name, PackedLinear.of(linear))
    return len(found)
