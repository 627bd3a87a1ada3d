"""Tensor parallel: what one process reads from its attention heads becomes what all heads of the layer say.

Weights that transformers splits are `DTensor`s, so the attention module itself tells which processes share its heads.
Every process gets the same sums, bit for bit, and so takes the same decisions. Without tensor parallel nothing here
does anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, distributed, nn

from mustdrop.compat import eager

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

_DIM = "tp"  # name of the dimension of a device mesh; where it has no names, it is the last


@eager
def group_of(module: nn.Module) -> ProcessGroup | None:
    """The processes that share the weights of an attention module; None if this one has all of them.

    Args:
        module: an attention module, whose heads go with its weights.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    for parameter in _split(module):
        mesh = parameter.device_mesh
        names = mesh.mesh_dim_names or ("",) * (mesh.ndim - 1) + (_DIM,)
        if _DIM in names and parameter.placements[names.index(_DIM)].is_shard():
            return mesh.get_group(names.index(_DIM))
    return None


def is_split(model: nn.Module) -> bool:
    """Whether any weight of a model says by itself how processes share it."""
    return distributed.is_available() and bool(_split(model))


def size(group: ProcessGroup | None) -> int:
    """How many processes there are."""
    return 1 if group is None else distributed.get_world_size(group)


@eager
def mean_over_heads(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """A mean over the heads of this process as the mean over the heads of all, which have equally many.

    Args:
        x: any shape, the same in every process.
        group: the processes, from `group_of`.
    """
    if group is None:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(x, group=group)
    return x / size(group)


@eager
def side_by_side(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Heads (B, H, N, D) of this process as those of all, (B, processes * H, N, D), in the order of the whole model.

    Args:
        x: queries or keys.
        group: the processes, from `group_of`.
    """
    if group is None:
        return x
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(size(group))]
    distributed.all_gather(parts, x, group=group)
    return torch.cat(parts, 1)


def _split(module: nn.Module) -> list[DTensor]:
    from torch.distributed.tensor import DTensor  # slow to import, and absent where torch was built without it

    return [cast(DTensor, parameter) for parameter in module.parameters() if isinstance(parameter, DTensor)]
