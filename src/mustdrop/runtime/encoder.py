"""The vision stage inside a running encoder: shrink after one layer, score at another, undo the shrinking at the exit.

What leaves the encoder has its full length again, and so have the projected features: a dropped token is a row of NaN
in
them. So everything in transformers that counts features (placeholder checks, beams, chunks) sees nothing unusual, and
the
marks survive concatenation, casts and re-grouping.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from mustdrop.adapters.base import ImageLayout, Tower
from mustdrop.budget import share_out
from mustdrop.compat import eager
from mustdrop.errors import ConfigError, MustDropError
from mustdrop.kernels.reference import received_attention, row_probabilities
from mustdrop.pruners import VisionStagePruner
from mustdrop.runtime.masks import encoder_mask
from mustdrop.runtime.plan import rows_of_images
from mustdrop.runtime.state import ImageMarks, Local
from mustdrop.runtime.tap import attention_of
from mustdrop.selection import Selection

if TYPE_CHECKING:
    from mustdrop.runtime.core import Runtime

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
            visible = nn.functional.pad(run.merged.valid, (prefix, 0), value=True)
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
        return torch.cat([state[:, :prefix], merged.expand(state[:, prefix:], merged.merge_into.shape[1])], 1)


class FeaturesWrapper:
    """Stands in for `get_image_features` on the base model: runs the stage and marks dropped rows with NaN."""

    def __init__(self, runtime: Runtime, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.runtime, self.function = runtime, function

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode as before, with NaN in the rows of dropped features."""
        runtime = self.runtime
        local, stage = runtime.local, runtime.encoder
        arguments = inspect.signature(self.function).bind(*args, **kwargs).arguments
        arguments = {**arguments.pop("kwargs", {}), **arguments}
        if arguments.get(runtime.adapter.pixels) is None:
            return self.function(*args, **kwargs)  # for transformers' own error message
        layouts = runtime.adapter.layouts(runtime.model, arguments)
        sizes = [layout.size for layout in layouts]
        call = local.call
        totals = call.totals if call is not None and rows_of_images(sizes, call.totals) is not None else sizes
        owners = rows_of_images(sizes, totals) or []
        if call is not None:
            call.grids = _grouped([(*layout.grid, layout.prefix) for layout in layouts], owners, len(totals))
        if stage is None:
            return self.function(*args, **kwargs)
        stage.check(runtime.adapter.read_layer(runtime.model, arguments))
        plans = call.plans if call is not None and totals is call.totals else [runtime.plan(size) for size in totals]
        least, most = (
            _limits(sizes, owners, [p.at_least for p in plans]),
            _limits(sizes, owners, [p.at_most for p in plans]),
        )

        at_least = torch.tensor(least) - torch.tensor([layout.prefix for layout in layouts])
        run = local.encoder = EncoderRun(layouts, at_least if stage.pruner.selects else None)
        try:
            output = self.function(*args, **kwargs)
        finally:
            local.encoder, local.capture = None, None
        ends = [row for row, end in enumerate(call.open_ended) if end] if call is not None and owners else []
        last = [max(i for i, owner in enumerate(owners) if owner == row) for row in ends if row in owners]
        marks = self._marks(stage.pruner, run, most, output.pooler_output, last)
        output.pooler_output = _write(output.pooler_output, [mark.alive for mark in marks])
        if call is not None:
            call.marks = _grouped(marks, owners, len(totals))
        return output

    def _marks(
        self, pruner: VisionStagePruner, run: EncoderRun, most: list[int], features: Any, last: list[int]
    ) -> list[ImageMarks]:
        """The decisions per image. `last` are images whose last patch ends a prompt and must stay."""
        prefix = run.layouts[0].prefix
        total = run.layouts[0].size - prefix
        device = features[0].device
        images = len(run.layouts)
        if [len(f) for f in features] != [layout.size for layout in run.layouts]:
            raise MustDropError(
                f"the adapter {self.runtime.adapter.name!r} expected "
                f"{[layout.size for layout in run.layouts]} features per image, the model made "
                f"{[len(f) for f in features]}."
            )
        merged = run.merged or Selection.from_mask(torch.ones(images, total, dtype=torch.bool, device=device))
        slots = torch.zeros(images, merged.keep.shape[1], device=device)
        if pruner.needs_attention:
            if run.importance is None:
                raise MustDropError(
                    f"encoder layer {pruner.key_layer} did not run, so there is no attention to score "
                    f"with: choose another key_layer."
                )
            slots = run.importance.to(device)
        importance = torch.zeros(images, total, device=device).scatter_add(
            1, merged.keep, slots.masked_fill(~merged.valid, 0)
        )
        owner = torch.arange(total, device=device).expand(images, -1)
        if merged.merge_into is not None:
            owner = merged.keep.gather(1, merged.merge_into)
        importance[last, owner[last, -1]] = torch.inf
        alive = merged.mask(total)
        limit = torch.tensor(most, device=device) - prefix
        count = limit if pruner.selects and bool((alive.sum(1) > limit).any()) else None
        keep, pinned = pruner.select(importance, alive, count)

        for i in last:  # if the last patch was merged, it names its window in place of the centre
            name = int(owner[i, -1])
            owner = owner.clone()
            owner[i] = owner[i].masked_fill(owner[i] == name, total - 1)
            for mask in (keep, pinned):
                mask[i, -1], mask[i, name] = mask[i, name].clone(), mask[i, name] & (name == total - 1)
        order = merged.assignment(total) if pruner.compat == "released" else owner
        assignment = owner.masked_fill(~keep.gather(1, owner), -1)
        passed = [tokens.tolist() for tokens in run.tokens]
        marks = []
        for i in range(images):
            extra = (prefix, 0)
            pad = nn.functional.pad
            shifted = torch.where(assignment[i] < 0, -1, assignment[i] + prefix)
            marks.append(
                ImageMarks(
                    alive=pad(keep[i], extra, value=True),
                    pinned=pad(pinned[i], extra, value=False),
                    importance=pad(importance[i], extra),
                    order=torch.cat([torch.arange(prefix, device=device), order[i] + prefix]),
                    assignment=torch.cat([torch.arange(prefix, device=device), shifted]),
                    passed=tuple(tokens[i] for tokens in passed),
                    grid=(*run.layouts[i].grid, prefix),
                )
            )
        return marks


def _grouped(values: list[T], owners: list[int], rows: int) -> list[list[T]]:
    """One list per prompt of what belongs to its images."""
    out: list[list[T]] = [[] for _ in range(rows)]
    for value, row in zip(values, owners, strict=True):
        out[row].append(value)
    return out


def _limits(sizes: list[int], owners: list[int], amounts: list[int]) -> list[int]:
    """Per image, its part of its prompt's `amounts`."""
    out: list[int] = []
    for row, amount in enumerate(amounts):
        mine = [size for size, owner in zip(sizes, owners, strict=True) if owner == row]
        if mine:
            out += share_out(amount, mine)
    return out


def _write(features: Any, alive: list[Tensor]) -> Any:
    """The features with NaN in the rows that are dropped; same container type as before."""
    marked = [
        f if bool(keep.all()) else f.masked_fill(~keep.to(f.device)[:, None], torch.nan)
        for f, keep in zip(features, alive, strict=True)
    ]
    return torch.stack(marked) if isinstance(features, Tensor) else type(features)(marked)
