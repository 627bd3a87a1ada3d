"""A `PictureRule` at work in a model: smaller pictures for the encoder, and features of the usual number after it."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mustdrop.adapters.base import Adapter
from mustdrop.constants import sent
from mustdrop.errors import MustDropError
from mustdrop.layout import Layout
from mustdrop.pruners import PictureRule
from mustdrop.runtime.state import Local
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.runtime.vision.media_plan import MediaPlan


@dataclass
class SmallerPictures:
    """The media of one call, some of them smaller.

    Attributes:
        rule: says how small.
        adapter: of the family.
        model: the model.
        kind: of media.
        plan: what is asked of each medium.
        item: patches of one item of a dense tower; 0 where each medium is an item.
        run: what the encoder is asked to do.
    """

    rule: PictureRule
    adapter: Adapter
    model: Any
    kind: str
    plan: MediaPlan
    item: int
    run: EncoderRun

    def __call__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], arguments: dict[str, Any]
    ) -> Any:
        """What the features method returns, with as many features as if nothing were smaller.

        Each feature of the usual grid has the value of the one of the smaller grid that lies at its place.
        """
        grids = [self._smaller(layout, most) for layout, most in zip(self.plan.layouts, self.plan.most, strict=True)]
        changed = self.adapter.resized(self.model, self.kind, arguments, [grid[1:] for grid in grids])
        if changed is None:  # the tower takes pictures of one size
            self.run.seen = self.seen
            return function(*args, **kwargs)
        output = function(**_replaced(function, args, kwargs, changed))
        index = torch.cat(_places(self.plan.layouts, grids))
        for name in (self.adapter.features, *self.adapter.added_features):
            value = getattr(output, name)
            levels = name in self.adapter.added_features
            spread = [self._spread(level, index) for level in value] if levels else self._spread(value, index)
            setattr(output, name, spread)
        return output

    def seen(self, pixels: Tensor) -> Tensor:
        """(items, channels, rows, columns) of a dense tower at the resolution of what may stay, in their usual size."""
        out = pixels
        for i, (layout, most) in enumerate(zip(self.plan.layouts, self.plan.most, strict=True)):
            if not layout.size or most >= layout.size:
                continue
            patches = layout.patch_table[~layout.gaps, 0]
            items = np.unique(patches // self.item) if self.item else np.array([i])
            if not len(items):
                continue
            if items[-1] >= len(pixels):
                raise MustDropError(
                    f"the {self.adapter.name} adapter expects {items[-1] + 1} pictures at its encoder, which got "
                    f"{len(pixels)}: they cannot be told apart to be resized."
                )
            alone = items[-1] - items[0] + 1 == len(items)  # one after the other
            which = slice(items[0], items[-1] + 1) if alone else sent(items, pixels.device)
            out = out.clone() if out is pixels else out
            out[which] = self.rule.blurred(pixels[which], (most / layout.size) ** 0.5)
        return out

    def _smaller(self, layout: Layout, most: int) -> tuple[int, int, int]:
        (grid,) = layout.grids if len(layout.grids) == 1 else ((1, 1, layout.size),)
        return (grid[0], *self.rule.reduced(grid, most)) if 0 < most < layout.size else grid

    def _spread(self, value: Any, index: Tensor) -> Any:
        if isinstance(value, Tensor):
            return value.flatten(0, -2)[index.to(value.device)]
        rows = torch.cat([part.flatten(0, -2) for part in value])
        pieces = torch.split(rows[index.to(rows.device)], [layout.size for layout in self.plan.layouts])
        if len(pieces) != len(value):
            raise MustDropError(
                f"the {self.adapter.name} model returned features in {len(value)} pieces for {len(pieces)} media: "
                "which belong together after resizing is not known."
            )
        return type(value)(pieces)


@dataclass
class PicturesHook:
    """Pre-hook of a dense tower whose pictures are shown at a lower resolution."""

    local: Local

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The same arguments with what `SmallerPictures.seen` makes of the pixels."""
        run: EncoderRun | None = self.local.encoder
        if run is None or run.seen is None:
            return None
        if args and isinstance(args[0], Tensor):
            return (run.seen(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": run.seen(kwargs["pixel_values"])}


def _places(layouts: Sequence[Layout], grids: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Per medium (N,) long, the feature of the smaller grid at the place of each feature, counted over all media."""
    starts = itertools.accumulate((t * r * c for t, r, c in grids), initial=0)
    found = []
    for layout, (_, high, wide), start in zip(layouts, grids, starts, strict=False):
        (frames, rows, columns) = layout.grids[0]
        t, i, j = torch.meshgrid(
            *(torch.arange(n, dtype=torch.long, device="cpu") for n in (frames, rows, columns)), indexing="ij"
        )
        found.append(start + ((t * high + i * high // rows) * wide + j * wide // columns).flatten())
    return found


def _replaced(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], changed: dict[str, Any]
) -> dict[str, Any]:
    """The arguments by name, with the changed ones in place; pixels may be the first one under another name."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    named = dict(bound.arguments)
    named |= named.pop("kwargs", {})
    first = next(iter(inspect.signature(function).parameters))
    return named | {name if name in named else first: value for name, value in changed.items()}
