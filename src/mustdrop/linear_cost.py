"""FLOPs per token of the linear layers inside a module: quantised, wrapped by peft, or of a mixture of experts."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import nn

#: What the blocks, routers and configurations of transformers call the number of experts that run for a token.
_CHOSEN = (
    *("top_k", "num_experts_per_tok", "num_experts_per_token", "num_selected_experts"),
    *("top_k_experts", "moe_top_k", "moe_topk", "moe_k", "topk"),
)

#: Names of the fused weights of experts -> how many projections of hidden size times intermediate size they hold.
_PROJECTIONS = {"gate_up_proj": 2, "gate_proj": 1, "up_proj": 1, "down_proj": 1}


def linear_flops(module: nn.Module, without: Collection[str] = ()) -> int:
    """FLOPs per token of the linear layers inside `module` that run.

    Quantised layers count like the layers that they replace. A layer that peft has wrapped counts once, with the
    adapters that are active in it. Of a mixture of experts count the router, the shared experts and as many experts
    as run for a token; experts that are told nothing about the choice of the router all run.

    Args:
        module: a layer, or what holds layers.
        without: names of modules inside, at any depth, that do not run.
    """
    return _flops(module, without, ())


def _flops(module: nn.Module, without: Collection[str], around: tuple[nn.Module, ...]) -> int:
    """`linear_flops` of a module inside others, the innermost last, which may say how many experts run."""
    parts: dict[str, Any] = module._modules
    if "base_layer" in parts:
        return sum(_flops(part, without, around) for part in _adapted(module))
    if "original_module" in parts:  # peft keeps a trained copy of the same shape beside it, and runs one of the two
        return _flops(parts["original_module"], without, around)
    around = (*around, module)
    fused = _fused(module, around)
    if fused:
        return _running(module, fused, around)
    ran = {name: part for name, part in parts.items() if part is not None and name not in without}
    inside = sum(_part(name, part, without, around) for name, part in ran.items()) + _routers(ran, around)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if inside or None in sizes:
        return inside
    return 2 * int(cast(Any, sizes[0])) * int(cast(Any, sizes[1]))


def _part(name: str, part: nn.Module, without: Collection[str], around: tuple[nn.Module, ...]) -> int:
    """Of one module inside another; experts that are modules of their own are of one size."""
    listed = _listed(name, part)
    if not listed:
        return _flops(part, without, around)
    return _running(part, [_flops(expert, without, ()) for expert in listed], around)


def _running(experts: nn.Module, each: list[int], around: tuple[nn.Module, ...]) -> int:
    """Of experts that cost `each`: of the chosen ones, or of all where `forward` hears of hidden states alone."""
    named = list(inspect.signature(type(experts).forward).parameters.values())[1:]
    told = len(named) != 1 or named[0].kind is inspect.Parameter.VAR_POSITIONAL
    chosen = _chosen(around) if told else None
    return sum(each) * min(chosen or len(each), len(each)) // len(each)


def _chosen(around: tuple[nn.Module, ...]) -> int | None:
    """How many experts run for a token, as the nearest block, a module in it (the router) or their configurations say.

    None if nobody says so: then these are no experts that a router chooses from.
    """
    for block in reversed(around):
        near = [_bare(part) for part in (block, *block._modules.values()) if part is not None]
        for source in (*near, *(getattr(part, "config", None) for part in near)):
            for name in _CHOSEN:
                value = getattr(source, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
    return None


def _bare(module: Any) -> nn.Module:
    """What peft has wrapped, however often."""
    while True:
        inner = module._modules.get("base_layer") or module._modules.get("original_module")
        if inner is None:
            return cast(nn.Module, module)
        module = inner


def _fused(module: Any, around: tuple[nn.Module, ...]) -> list[int]:
    """FLOPs of each expert of a module that holds the weights of all in tensors of (experts, ...); else empty.

    Weights of packed numbers do not have the shape that they stand for, or are no parameters any more; the module then
    states its sizes.
    """
    held = {name: p for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    possible = held or "num_experts" in module.__dict__  # asked first, for it is quick and most modules are no experts
    if not possible or isinstance(module, nn.Conv1d) or _chosen(around) is None:
        return []
    weights = {name: p for name, p in held.items() if "scale" not in name and "bias" not in name}
    if weights and all(weight.is_floating_point() for weight in weights.values()):
        shapes = [tuple(map(int, weight.shape)) for weight in weights.values()]
        return [2 * sum(high * wide for _, high, wide in shapes)] * shapes[0][0]
    number = getattr(module, "num_experts", None)
    packed = [
        name for name in _PROJECTIONS if hasattr(module, name) and not isinstance(getattr(module, name), nn.Module)
    ]
    size = _size(module, "hidden_dim", "hidden_size") * _size(module, "intermediate_dim", "intermediate_size")
    return [2 * size * sum(map(_PROJECTIONS.__getitem__, packed))] * number if number and packed and size else []


def _size(module: nn.Module, *names: str) -> int:
    """The first of these that the module states, or 0."""
    return next((int(cast(Any, getattr(module, name))) for name in names if hasattr(module, name)), 0)


def _listed(name: str, part: nn.Module) -> list[nn.Module]:
    """The experts of a list of them; empty for another module."""
    if not name.endswith("experts") or "shared" in name:
        return []
    return [expert for key, expert in _bare(part)._modules.items() if key.isdigit() and expert is not None]


def _routers(ran: Mapping[str, nn.Module], around: tuple[nn.Module, ...]) -> int:
    """Of routers that are no linear layers: as many rows as there are experts beside such a weight tell it."""
    held = ((_bare(part), _bare(part)._parameters.get("weight")) for part in ran.values())
    bare = [(part, weight) for part, weight in held if weight is not None and weight.ndim == 2]
    weights = [weight for part, weight in bare if not hasattr(part, "in_features")]
    experts = {_experts(name, part, around) for name, part in ran.items()} - {0} if weights else ()
    return sum(2 * int(weight.numel()) for weight in weights if weight.shape[0] in experts)


def _experts(name: str, part: nn.Module, around: tuple[nn.Module, ...]) -> int:
    """How many experts a module holds, itself or one level deeper."""
    inside = [_bare(part), *(_bare(inner) for inner in part._modules.values() if inner is not None)]
    return max(len(_listed(name, part)), *(len(_fused(module, around)) for module in inside))


def _adapted(module: Any) -> list[nn.Module]:
    """What a layer wrapped by peft runs: the original and, unless merged into it or switched off, its adapters.

    Adapters of a bare parameter, as of fused experts, change it once per call and cost nothing per token.
    """
    parts = [module.base_layer]
    if hasattr(module, "parameter_name"):
        return parts
    if not getattr(module, "merged", False) and not getattr(module, "disable_adapters", False):
        kinds = [module._modules.get(name) for name in getattr(module, "adapter_layer_names", ())]
        active = getattr(module, "active_adapters", ())
        parts += [kind[name] for kind in kinds if isinstance(kind, nn.ModuleDict) for name in active if name in kind]
    return parts
