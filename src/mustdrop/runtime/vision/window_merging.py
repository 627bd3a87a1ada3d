"""Windows that merge after a layer of a dense encoder: the merge, the mask of the layers after it, and the way back.

Mask and way back also serve merging inside the layers (`mustdrop.runtime.vision.block_merging`).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mustdrop import kernels
from mustdrop.constants import count_up
from mustdrop.indices import HOST, on, take
from mustdrop.pruners import VisionStagePruner
from mustdrop.runtime.attention_capture import implementation_of
from mustdrop.runtime.masks import cut_encoder_mask, encoder_mask
from mustdrop.runtime.masks_flex import Mask
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.selection import Selection


def merge(pruner: VisionStagePruner, run: EncoderRun, hidden: Tensor) -> Tensor:
    """Merge the windows of `hidden` (items, prefix + patches, C) that are to merge; `run` notes what became of each."""
    prefix = run.tower.prefix
    patches = hidden[:, prefix:]
    assert run.grid is not None
    if run.windows is not None:
        run.windows = [*run.windows, *[0] * (len(hidden) - len(run.windows))]
        if not any(run.windows):
            return hidden
        similarity = pruner.similarity(patches, run.grid, run.pool)
        run.merged, *names = pruner.merge_most(similarity, run.grid, run.windows, run.pool)
        run.even = len(set(run.windows)) == 1
        run.names = names[0], names[1]
        merged = kernels.merge_tokens(patches, cast(Tensor, run.merged.merge_into), run.merged.keep.shape[1])
        return torch.cat([hidden[:, :prefix], merged], 1)
    similarity = pruner.similarity(patches, run.grid, run.pool).to(HOST)
    run.merged = pruner.merge_by(similarity, run.grid, run.at_least, run.pool)
    if bool(run.merged.valid.all()) and run.merged.keep.shape[1] == patches.shape[1]:
        run.merged = None  # no window is similar enough: the tensors stay as they are, bit for bit
        return hidden
    return torch.cat([hidden[:, :prefix], run.merged.to(hidden.device).apply(patches)], 1)


def mask_of(run: EncoderRun, given: Mask, hidden: Tensor, module: nn.Module) -> Mask:
    """The mask that hides padding, and what the mask that came hides; made once per mask that comes."""
    merged, prefix = run.merged, run.tower.prefix
    assert merged is not None
    bias = None if run.inside is None else run.inside.bias(hidden.dtype)
    if bias is not None or (run.inside is not None and run.inside.lengths and not run.inside.uneven):
        return bias
    key = (id(given), id(merged))
    if key not in run.masks:
        visible = nn.functional.pad(merged.valid, (prefix, 0), value=True)
        if given is None or run.inside is not None:
            made = encoder_mask(visible, implementation_of(module), hidden)
        else:
            slots = nn.functional.pad(merged.keep + prefix, (prefix, 0))
            slots[:, :prefix] = torch.arange(prefix, dtype=torch.long, device=slots.device)
            made = cut_encoder_mask(given, on(slots, hidden.device), on(visible, hidden.device))
        run.masks[key] = (merged, made)  # holding what it is made of keeps its id from being used again
    return run.masks[key][1]


class Whole:
    """Gives hidden states all patches: each has the value of what it became part of, zero if it is gone."""

    def __init__(self, merged: Selection, into: Tensor, prefix: int, complete: bool) -> None:
        """`complete` says that no patch is gone."""
        front = count_up(len(into), prefix, into.device)
        self.row = torch.cat([front, (into if complete else into.clamp(min=0)) + prefix], 1)
        gone = None if complete or not bool((into < 0).any()) else into < 0
        self.gone = None if gone is None else nn.functional.pad(gone, (prefix, 0))
        self.length = merged.keep.shape[1] + prefix

    def __call__(self, state: Tensor | None) -> Tensor | None:
        """(items, prefix + patches, C) of a hidden state; one that has all patches as it is."""
        if state is None or state.ndim != 3 or state.shape[1] != self.length:
            return state
        self.row = on(self.row, state.device)
        out = take(state, self.row, 1, padded=False)
        return out if self.gone is None else out.masked_fill(on(self.gone, state.device)[..., None], 0)
