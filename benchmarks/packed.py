"""Linear layers whose weights are laid out for the processor once, not at every call.

The patch embedding of a packed encoder is one of them: a convolution whose input is as large as its kernel multiplies
each patch with one matrix. torch computes it as a convolution, four to five times slower than that product, and
pruning cannot shorten it.

A matrix library copies the weights into its own layout at each product. That costs the same for 80 rows as for 640, so
it eats up a part of what shorter prompts save. Frozen models that serve on a CPU do not pay it (`torch.compile` with
`freezing` packs in the same way): this is the same step, for eager models and for both sides of a comparison.
"""

from __future__ import annotations

from typing import Any

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


class PackedPatches(nn.Conv3d):
    """A `Conv3d` of patches, each as large as the kernel: the linear layer that this is, with packed weights."""

    packed: Tensor

    @classmethod
    def of(cls, convolution: nn.Conv3d) -> PackedPatches:
        """The packed form of a float32 patch embedding on the CPU."""
        sizes = convolution.in_channels, convolution.out_channels, convolution.kernel_size, convolution.stride
        out: PackedPatches = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            cls, *sizes, bias=convolution.bias is not None
        )
        out.weight, out.bias = convolution.weight, convolution.bias
        out.packed = torch.ops.mkldnn._reorder_linear_weight(convolution.weight.detach().flatten(1))
        return out

    def forward(self, input: Tensor) -> Tensor:
        """As `Conv3d.forward`, without gradients; (patches, C, T, H, W) to (patches, D, 1, 1, 1)."""
        if input.shape[2:] != self.kernel_size:  # pictures, and no patches
            return super().forward(input)
        made: Tensor = torch.ops.mkldnn._linear_pointwise(input.flatten(1), self.packed, self.bias, "none", [], "")
        return made[..., None, None, None]


def _of_patches(convolution: Any) -> bool:
    """Whether patches that do not overlap are all that it can see."""
    plain = not any(convolution.padding) and convolution.groups == 1 and set(convolution.dilation) == {1}
    return plain and convolution.stride == convolution.kernel_size


def pack(model: nn.Module) -> int:
    """Pack every linear layer and patch embedding of a float32 model on the CPU; returns how many."""
    forms: dict[type[nn.Module], Any] = {nn.Linear: PackedLinear, nn.Conv3d: PackedPatches}
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child) in forms and (type(child) is nn.Linear or _of_patches(child))
    ]
    for module, name, child in found:
        setattr(module, name, forms[type(child)].of(child))
    return len(found)
