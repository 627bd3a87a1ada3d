"""`get_*_features` of a patched model: the vision stage's decisions, and their marks in the features."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from mustdrop.budget import share_out
from mustdrop.compat import eager
from mustdrop.errors import MustDropError
from mustdrop.pruners import VisionStagePruner
from mustdrop.runtime.encoder import EncoderRun
from mustdrop.runtime.plan import rows_of_images
from mustdrop.runtime.state import ImageMarks
from mustdrop.selection import Selection

if TYPE_CHECKING:
    from mustdrop.runtime.core import Runtime

T = TypeVar("T")


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
        merged = merged.to(device)  # the projector may be on another device than the encoder
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
