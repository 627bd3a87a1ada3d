"""How many features merge and stay, where that is known before the encoder runs.

Which features stay is then decided on the device (`mustdrop.runtime.vision.fixed_marks`). Media that a mask hides a
part of or that end a prompt, and rules that say themselves how many stay, are looked at by the host
(`mustdrop.runtime.vision.marks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mustdrop.budget import share_out
from mustdrop.layout import Layout
from mustdrop.pruners import VisionRule, VisionStagePruner
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.runtime.vision.media_plan import MediaPlan


@dataclass(frozen=True)
class FeatureCounts:
    """Numbers of features per medium.

    Attributes:
        merged: left once windows, or the encoder's layers, have merged.
        kept: enter the language model.
    """

    merged: list[int]
    kept: list[int]


def windows_inside(pruner: VisionStagePruner, plan: MediaPlan, run: EncoderRun) -> list[int]:
    """Per item of the encoder's batch, how many windows merge, so that each medium has its least or a few more.

    Args:
        pruner: the vision stage.
        plan: what is asked of each medium.
        run: the pass through the encoder.
    """
    assert run.grid is not None
    assert pruner.window is not None
    patches, most = run.grid[0] * run.grid[1], pruner.most_windows(run.grid, run.pool)
    lost = pruner.window**2 - 1  # features of a window that merges
    out: dict[int, int] = {}
    for layout, fewest in zip(plan.layouts, plan.least, strict=True):
        items, counts = layout.items(patches)
        gone = min(max(0, layout.size - fewest), sum(counts))
        shares = share_out(gone, counts) if items else []
        out |= {i: min(most, n // lost) for i, n in zip(items, shares, strict=True)}
    return [out.get(i, 0) for i in range(max(out, default=-1) + 1)]


def windows_behind(pruner: VisionStagePruner, layout: Layout, fewest: int) -> list[int]:
    """Per grid of a medium, how many windows of its features merge, so that `fewest` features or a few more stay."""
    sizes = [b - a for a, b in zip(layout.offsets[:-1], layout.offsets[1:], strict=True)]
    if not sum(sizes):
        return [0] * len(sizes)
    gone = share_out(min(max(0, layout.size - fewest), sum(sizes)), sizes)
    out = []
    for grid, n in zip(layout.grids, gone, strict=True):
        most = pruner.most_windows(grid)
        out.append(min(most, n // (pruner.window_tokens(grid) - 1)) if most else 0)
    return out


def counts_of(pruner: VisionStagePruner, run: EncoderRun, plan: MediaPlan, item: int) -> FeatureCounts | None:
    """Features of each medium that are left after merging and after the choice; None where only the data tell.

    Args:
        pruner: the vision stage.
        run: the pass through the encoder that begins.
        plan: what is asked of each medium.
        item: patches of one item of the encoder's batch.
    """
    layouts = plan.layouts
    sizes = [layout.size for layout in layouts]
    if run.inside is not None:
        gone = [sum(own) for own in run.inside.amounts]
        if len(gone) != len(layouts) or any(not own.in_picture == own.size == item for own in layouts):
            return None  # each medium must be one item
        merged = [size - n for size, n in zip(sizes, gone, strict=True)]
    elif pruner.window is None:
        merged = sizes
    elif not pruner.counts_windows:
        return None
    elif run.grid is not None:
        if run.windows is None:
            return None
        merged = _after_windows(pruner, run, layouts, run.windows)
    else:
        merged = []
        for layout, fewest in zip(plan.layouts, plan.least, strict=True):
            lost = [pruner.window_tokens(grid) - 1 for grid in layout.grids]
            merged.append(
                layout.size - sum(n * k for n, k in zip(windows_behind(pruner, layout, fewest), lost, strict=True))
            )
    return FeatureCounts(merged, [min(pair) for pair in zip(merged, plan.most, strict=True)])


def _after_windows(
    pruner: VisionStagePruner, run: EncoderRun, layouts: Sequence[Layout], windows: Sequence[int]
) -> list[int]:
    """Features per medium when so many windows of each item have merged and all their features are the medium's."""
    assert run.grid is not None
    assert pruner.window is not None
    patches, out = run.grid[0] * run.grid[1], []
    for layout in layouts:
        merged = sum(windows[i] for i in layout.items(patches)[0])
        out.append(layout.size - merged * (pruner.window**2 - 1))
    return out


def choosable(rule: VisionRule, run: EncoderRun, layouts: Sequence[Layout], pruner: VisionStagePruner) -> bool:
    """Whether it is known beforehand which features a rule chooses from: after merging, of whole single grids only."""
    if run.inside is None and pruner.window is None:
        return True
    patches = 0 if run.grid is None else run.grid[0] * run.grid[1] // run.pool**2
    return not run.windows or all(layout.in_picture == layout.size == patches for layout in layouts)
