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

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mustdrop.linear_cost import linear_flops as linear_flops  # also for those who read it off the account


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
