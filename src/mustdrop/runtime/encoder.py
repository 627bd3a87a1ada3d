"""The vision stage inside a running encoder: shrink after one layer, score at another, undo the shrinking at the exit.

What leaves the encoder has its full length again, and so have the projected features: a dropped token is a row of NaN
in
them. So everything in transformers that counts features (placeholder checks, beams, chunks) sees nothing unusual, and
the
marks survive concatenation, casts and re-grouping.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from mustdrop.adapters.base import ImageLayout, Tower
from mustdrop.compat import eager
from mustdrop.errors import ConfigError
from mustdrop.kernels.reference import received_attention, row_probabilities
from mustdrop.pruners import VisionStagePruner
from mustdrop.runtime.masks import encoder_mask
from mustdrop.runtime.state import Local
from mustdrop.runtime.tap import attention_of
from mustdrop.selection import Selection

if TYPE_CHECKING:
    pass

KEY = "vision"

T = TypeVar("T")


@dataclass
class EncoderRun:
    """State of one pass of images through the encoder.

    Attributes:
        layouts: one per image.
        at_least: (images,) long, tokens that merging must leave, or None.
        merged: what merging decided.
        mask: attention mask of the layers after merging, None if no image is shorter than another.
        importance: (images, slots) encoder attention per remaining token.
        tokens: per encoder layer, tokens per image that it processed.
    """

    layouts: list[ImageLayout]
    at_least: Tensor | None
    merged: Selection | None = None
    mask: Tensor | None = None
    importance: Tensor | None = None
    tokens: list[Tensor] = field(default_factory=list)


@dataclass
class BlockHook:
    """Pre-hook of one encoder layer."""

    stage: EncoderStage
    index: int

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See `EncoderStage.before_block`."""
        return self.stage.before_block(self.index, module, args, kwargs)


class EncoderStage:
    """Installs and runs a `VisionStagePruner` in one tower."""

    def __init__(self, pruner: VisionStagePruner, tower: Tower, local: Local) -> None:
        self.pruner, self.tower, self.local = pruner, tower, local
        depth = len(tower.blocks)
        if not -depth <= pruner.key_layer < depth:
            raise ConfigError(
                f"VisionStagePruner.key_layer={pruner.key_layer}: this encoder has layers 0 to "
                f"{depth - 1} (or negative, from the end)."
            )
        self.key_layer = pruner.key_layer % depth
        if pruner.window is not None and pruner.layer > depth - 2:
            raise ConfigError(
                f"VisionStagePruner.layer={pruner.layer}: merging after it needs a next layer; this "
                f"encoder has layers 0 to {depth - 1}."
            )
        if pruner.window is not None and self.key_layer <= pruner.layer and pruner.needs_attention:
            raise ConfigError(
                f"VisionStagePruner.key_layer={pruner.key_layer} must come after the merging layer "
                f"{pruner.layer}: it scores merged tokens."
            )

    def check(self, read_layer: int) -> None:
        """Raise `ConfigError` if merging would come after the layer that the features are read from."""
        if self.pruner.window is not None and self.pruner.layer >= read_layer:
            raise ConfigError(
                f"VisionStagePruner.layer={self.pruner.layer}: this model reads its features from "
                f"encoder layer {read_layer}; merge before it "
                f"(0 to {read_layer - 1})."
            )

    @eager
    def before_block(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Merge on the way into the layer after `layer`; mask padding in all later ones.

        Arm the tap at the key layer.
        """
        run: EncoderRun | None = self.local.encoder
        if run is None:
            return None
        if index == self.key_layer and self.pruner.needs_attention:
            self.local.capture = KEY
        merges = self.pruner.window is not None and index == self.pruner.layer + 1
        if merges:
            args = (self._merge(run, args[0], module), *args[1:])
        shape = args[0].shape
        length = (
            torch.full((shape[0],), shape[1], device=args[0].device)
            if run.merged is None
            else run.merged.counts + self.tower.prefix
        )
        run.tokens.append(length)
        if run.mask is None:
            return (args, kwargs) if merges else None
        if len(args) > 1:
            args = (args[0], run.mask, *args[2:])
        else:
            kwargs = {**kwargs, "attention_mask": run.mask}
        return args, kwargs

    def _merge(self, run: EncoderRun, hidden: Tensor, module: nn.Module) -> Tensor:
        prefix = self.tower.prefix
        patches = hidden[:, prefix:]
        run.merged = self.pruner.merge(patches, run.layouts[0].grid, run.at_least)
        if bool(run.merged.valid.all()) and run.merged.keep.shape[1] == patches.shape[1]:
            run.merged = None  # no window is similar enough: the tensors stay as they are, bit for bit
            return hidden
        visible = nn.functional.pad(run.merged.valid, (prefix, 0), value=True)
        config: Any = getattr(attention_of(module), "config", module)
        run.mask = encoder_mask(visible, str(getattr(config, "_attn_implementation", "eager")), hidden.dtype)
        return torch.cat([hidden[:, :prefix], run.merged.apply(patches)], 1)

    @eager
    def capture(self, module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Read the importance of each token from the key layer's queries and keys."""
        run: EncoderRun | None = self.local.encoder
        if run is None:
            return
        prefix, batch, length = self.tower.prefix, q.shape[0], k.shape[2]
        visible = torch.ones(batch, length, dtype=torch.bool, device=q.device)
        if run.merged is not None:
            visible = nn.functional.pad(run.merged.valid, (prefix, 0), value=True).to(q.device)
        scaling = kwargs.get("scaling") or getattr(module, "scale", None) or q.shape[-1] ** -0.5
        if self.tower.has_cls:
            cls = torch.zeros(batch, 1, dtype=torch.long, device=q.device)
            score = row_probabilities(q, k, cls, visible[:, None], scaling)[:, 0]
        else:
            score = received_attention(q, k, visible, scaling)
        run.importance = score[:, prefix:]

    @eager
    def after_tower(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Give every hidden state that is shorter its full length back.

        Each patch gets the value of what it became part of.
        """
        run: EncoderRun | None = self.local.encoder
        if run is None or run.merged is None or output is None:
            return output
        for name in ("last_hidden_state", "hidden_states"):
            value = getattr(output, name, None)
            if isinstance(value, tuple):
                output[name] = tuple(self._full(run.merged, state) for state in value)
            elif value is not None:
                output[name] = self._full(run.merged, value)
        return output

    def _full(self, merged: Selection, state: Tensor | None) -> Tensor | None:
        prefix = self.tower.prefix
        if (
            state is None
            or state.ndim != 3
            or state.shape[1] != merged.keep.shape[1] + prefix
            or merged.merge_into is None
        ):
            return state
        return torch.cat(
            [state[:, :prefix], merged.to(state.device).expand(state[:, prefix:], merged.merge_into.shape[1])], 1
        )
