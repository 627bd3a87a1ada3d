"""The cost account: FLOPs and KV bytes, with what the same call would have cost without pruning.

FLOPs count a multiply-add as two. A linear layer costs 2 * in * out per token; of a mixture of experts, those count
that run for a token. Attention costs 4 * heads * head_dim per visible (query, key) pair, for scores and values; it is
causal, so n tokens after p cached ones see n * p + n * (n + 1) / 2 pairs. Scoring costs 2 * heads * head_dim per (text
row, key) pair at a filter layer, and as much per (patch, patch) pair, or (CLS, patch) pair, where the attention of an
encoder layer is read. Norms, rotations, activations, short convolutions and what recurrent layers do with
their state are left out. The language head counts once per prompt and once per decode step.

The parts: `vision` is the encoder's layers and its patch embedding, `projector` what maps features into the language
model, `scoring` what pruning adds, `prefill` and `decode_step` the decoder layers and the head.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn


@dataclass(frozen=True)
class Compared:
    """A quantity of the call beside what it would have been without pruning.

    Attributes:
        actual: as it was.
        unpruned: counterpart without pruning.
        parts: what it is made of, by name.
    """

    actual: float
    unpruned: float
    parts: dict[str, Compared] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """`actual` / `unpruned`; 1.0 where both are zero."""
        return self.actual / self.unpruned if self.unpruned else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        out: dict[str, Any] = {"actual": self.actual, "unpruned": self.unpruned, "ratio": self.ratio}
        return out | ({"parts": {name: part.to_dict() for name, part in self.parts.items()}} if self.parts else {})


def total(parts: dict[str, Compared], counted: Sequence[str]) -> Compared:
    """Sum of the parts named in `counted`; all parts stay visible."""
    return Compared(sum(parts[n].actual for n in counted), sum(parts[n].unpruned for n in counted), parts)


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


def causal_pairs(new: int, past: int) -> int:
    """Visible (query, key) pairs of `new` tokens after `past` cached ones."""
    return new * past + new * (new + 1) // 2


@dataclass(frozen=True)
class TextCost:
    """Cost of a decoder stack.

    Attributes:
        linear: FLOPs per token of each layer's linear layers.
        widths: heads * head_dim of each layer; 0 of a recurrent one, whose tokens see a state and not each other.
        head: FLOPs of the language head for one token.
        vision: as `linear`, of vision tokens, which may have experts of their own.
    """

    linear: tuple[int, ...]
    widths: tuple[int, ...]
    head: int
    vision: tuple[int, ...]

    @classmethod
    def of(
        cls,
        layers: nn.ModuleList,
        config: Any,
        model: Any,
        experts_of: Mapping[str, str],
        recurrent: Collection[int] = (),
    ) -> TextCost:
        """Read the sizes off a model.

        Args:
            layers: the decoder layers.
            config: of the text model.
            model: has the language head, or none.
            experts_of: `Adapter.experts_of`.
            recurrent: `Adapter.recurrent`.
        """
        heads = int(config.num_attention_heads)
        own = [getattr(getattr(layer, "self_attn", None), "head_dim", 0) for layer in layers]
        if not all(dim for i, dim in enumerate(own) if i not in recurrent):
            own = [getattr(config, "head_dim", None) or config.hidden_size // heads] * len(own)
        own = [0 if i in recurrent else dim for i, dim in enumerate(own)]
        head = model.get_output_embeddings()
        others = {kind: [name for of, name in experts_of.items() if of != kind] for kind in ("text", "vision")}
        text = tuple(linear_flops(layer, others["text"]) for layer in layers)
        return cls(
            text,
            tuple(heads * int(dim) for dim in own),
            linear_flops(head) if head is not None else 0,
            tuple(linear_flops(layer, others["vision"]) for layer in layers) if experts_of else text,
        )

    def prefill(self, new: Sequence[int], past: Sequence[int], vision: Sequence[int]) -> int:
        """One prompt: `new` tokens per layer, of which `vision` are vision tokens, after `past` cached ones."""
        layers: Iterable[tuple[int, ...]] = zip(self.linear, self.vision, self.widths, new, past, vision, strict=True)
        return self.head + sum(
            text * (n - v) + seen * v + 4 * wide * causal_pairs(n, p) for text, seen, wide, n, p, v in layers
        )

    def step(self, cached: Sequence[int]) -> int:
        """One decode step over `cached` entries per layer."""
        return self.head + sum(
            c + 4 * width * (n + 1) for c, width, n in zip(self.linear, self.widths, cached, strict=True)
        )

    def scoring(self, layer: int, raters: int, keys: int) -> int:
        """One filter: `raters` text rows against `keys`."""
        return 2 * self.widths[layer] * raters * keys


def embedding_flops(encoder: nn.Module, blocks: Collection[nn.Module]) -> int:
    """FLOPs per patch of what turns pixels into patches: the first convolution (or linear layer) of an encoder."""
    inside = {id(m) for block in blocks for m in block.modules()}
    for module in encoder.modules():
        if id(module) in inside:
            continue
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return 2 * int(module.weight.numel())
        # a linear layer, quantised ones too: these may hold no `weight`, or one of packed numbers
        flops = linear_flops(module) if hasattr(module, "in_features") else 0
        if flops:
            return flops
    return 0


@dataclass(frozen=True)
class EncoderCost:
    """Cost of an encoder.

    Attributes:
        embedding: FLOPs per patch of what turns pixels into patches.
        linear: FLOPs per token of each layer's linear layers.
        width: heads * head_dim.
    """

    embedding: int
    linear: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, encoder: nn.Module, blocks: Collection[nn.Module]) -> EncoderCost:
        """Read the sizes off an encoder and its layers."""
        config: Any = encoder.config
        width = int(config.hidden_size if not hasattr(config, "embed_dim") else config.embed_dim)
        return cls(embedding_flops(encoder, blocks), tuple(linear_flops(block) for block in blocks), width)

    def layers(self, lengths: Sequence[Sequence[int]]) -> int:
        """The encoder's layers. `lengths` are, per layer, those of the sequences that attend to themselves."""
        return sum(
            linear * sum(own) + 4 * self.width * sum(n * n for n in own)
            for linear, own in zip(self.linear, lengths, strict=True)
        )
