"""Linear layers whose weights are packed into 4 bits, as checkpoints of GPTQ and AWQ hold them. No package is needed.

`PackedLinear` has the tensors of GPTQ's layer (its second format) and, like it, no `weight`. The two functions behind
it write them, and those of AWQ, so that a tiny checkpoint can be made for the real kernels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

BITS, PER_WORD, LARGEST = 4, 8, 15
#: Which of 8 neighbouring columns AWQ keeps in which 4 bits of a word, lowest first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(values: Tensor) -> Tensor:
    """(..., 8 * n) numbers of 4 bits -> (..., n) int32, the first in the lowest bits."""
    packed = (values.long().unflatten(-1, (-1, PER_WORD)) << BITS * torch.arange(PER_WORD)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def numbers(packed: Tensor) -> Tensor:
    """The inverse of :func:`words`."""
    shifts = BITS * torch.arange(PER_WORD, device=packed.device, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & LARGEST).flatten(-2)


def rounded(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, in) -> numbers (in, out), zeros and scales (groups, out), the scales rounded to float16."""
    groups = weight.detach().float().t().unflatten(0, (-1, group))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / LARGEST).clamp(min=1e-4).half()
    zeros = (-low / scales).round().clamp(0, LARGEST)
    return (groups / scales[:, None] + zeros[:, None]).round().clamp(0, LARGEST).flatten(0, 1), zeros, scales


class PackedLinear(nn.Module):
    """What replaces an ``nn.Linear`` with sizes of whole words."""

    def __init__(self, linear: nn.Linear, group: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values, zeros, scales = rounded(linear.weight, group)
        self.register_buffer("qweight", words(values.t()).t().contiguous())
        self.register_buffer("qzeros", words(zeros))
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", (torch.arange(self.in_features) // group).int())
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """The weights are made anew at each call."""
        places = self.g_idx.long()
        values, zeros = numbers(self.qweight.t()).t(), numbers(self.qzeros)
        weight = (values - zeros[places]).to(x.dtype) * self.scales.to(x.dtype)[places]
        return x @ weight + getattr(self, "bias", 0)


def fits(module: nn.Module, group: int) -> bool:
    """Whether `module` is a plain linear layer with sizes of whole words and groups."""
    if type(module) is not nn.Linear:
        return False
    return not (module.in_features % group or module.in_features % PER_WORD or module.out_features % PER_WORD)


def pack(model: Any, inside: tuple[nn.Module, ...], group: int = 8) -> int:
    """Replace the linear layers inside some parts of a model. How many there were."""
    found = [
        (parent, name, child)
        for part in inside
        for parent in part.modules()
        for name, child in parent.named_children()
        if fits(child, group)
    ]
    for parent, name, child in found:
        setattr(parent, name, PackedLinear(child, group))
    return len(found)


def for_awq(model: Any) -> dict[str, Tensor]:
    """The state of a packed model, with each packed layer as AWQ writes it."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("g_idx")}
    order = torch.arange(PER_WORD).view(1, PER_WORD)[:, list(AWQ_ORDER)]
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            columns = (PER_WORD * torch.arange(module.out_features // PER_WORD)[:, None] + order).flatten()
            state[f"{name}.qweight"] = words(numbers(module.qweight.t()).t()[:, columns])
            state[f"{name}.qzeros"] = words(numbers(module.qzeros)[:, columns])
    return state


def packed_copy(model: Any, *inside: str, group: int = 8) -> Any:
    """A copy of `model` with packed layers inside the parts of these names."""
    made = copy.deepcopy(model)
    assert pack(made, tuple(made.get_submodule(name) for name in inside), group), "nothing is packed"
    return made
