"""The cost account: FLOPs and KV bytes, with what the same call would have cost without pruning.

FLOPs count a multiply-add as two. A linear layer costs 2 * in * out per token. Attention costs 4 * heads * head_dim per
visible (query, key) pair, for scores and values; it is causal, so n tokens after p cached ones see
n * p + n * (n + 1) / 2 pairs. Scoring costs 2 * heads * head_dim per (text row, key) pair at a filter layer. Norms,
rotations and activations are left out. The language head counts once per prompt and once per decode step.

The parts: `vision` is the encoder's layers and its patch embedding, `projector` what maps features into the language
model, `scoring` what pruning adds, `prefill` and `decode_step` the decoder layers and the head.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def linear_flops(module: nn.Module) -> int:
    """FLOPs per token of the linear layers inside `module` that run.

    Quantised layers count like the layers that they replace. A layer that peft has wrapped counts once, with the
    adapters that are active in it.
    """
    parts: dict[str, Any] = module._modules
    if "base_layer" in parts:
        return sum(linear_flops(part) for part in _adapted(module))
    if "original_module" in parts:  # peft keeps a trained copy of the same shape beside it, and runs one of the two
        return linear_flops(parts["original_module"])
    inside = sum(linear_flops(part) for part in parts.values() if part is not None)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if inside or None in sizes:
        return inside
    return 2 * int(cast(Any, sizes[0])) * int(cast(Any, sizes[1]))


def _adapted(module: Any) -> list[nn.Module]:
    """What a layer wrapped by peft runs: the original and, unless merged into it or switched off, its adapters."""
    parts = [module.base_layer]
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
        widths: heads * head_dim of each layer.
        head: FLOPs of the language head for one token.
    """

    linear: tuple[int, ...]
    widths: tuple[int, ...]
    head: int

    @classmethod
    def of(cls, layers: nn.ModuleList, config: Any, head: nn.Module | None) -> TextCost:
        """Read the sizes off a model."""
        heads = int(config.num_attention_heads)
        own = [getattr(getattr(layer, "self_attn", None), "head_dim", 0) for layer in layers]
        if not all(own):
            own = [getattr(config, "head_dim", None) or config.hidden_size // heads] * len(own)
        return cls(
            tuple(linear_flops(layer) for layer in layers),
            tuple(heads * int(dim) for dim in own),
            linear_flops(head) if head is not None else 0,
        )

    def prefill(self, new: Sequence[int], past: Sequence[int]) -> int:
        """One prompt: `new` tokens per layer after `past` cached ones."""
        return self.head + sum(
            c * n + 4 * width * causal_pairs(n, p)
            for c, width, n, p in zip(self.linear, self.widths, new, past, strict=True)
        )

    def step(self, cached: Sequence[int]) -> int:
        """One decode step over `cached` entries per layer."""
        return self.head + sum(
            c + 4 * width * (n + 1) for c, width, n in zip(self.linear, self.widths, cached, strict=True)
        )

    def scoring(self, layer: int, raters: int, keys: int) -> int:
        """One filter: `raters` text rows against `keys`."""
        return 2 * self.widths[layer] * raters * keys


def embedding_flops(encoder: nn.Module, blocks: nn.ModuleList) -> int:
    """FLOPs per patch of what turns pixels into patches: the first convolution (or linear layer) of an encoder."""
    inside = {id(m) for m in blocks.modules()}
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


def encoder_flops(blocks: nn.ModuleList, config: Any, lengths: Sequence[Sequence[int]]) -> int:
    """An encoder's layers. `lengths` are, per layer, those of the sequences that attend to themselves."""
    width = int(config.hidden_size if not hasattr(config, "embed_dim") else config.embed_dim)
    return sum(
        linear_flops(block) * sum(own) + 4 * width * sum(n * n for n in own)
        for block, own in zip(blocks, lengths, strict=True)
    )
