"""What leaves a packed encoder, and when: predictable cells before its layers, merged windows and the rest inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mustdrop.adapters.base import Adapter, Tower
from mustdrop.errors import ConfigError, UnsupportedModelError
from mustdrop.indices import HOST
from mustdrop.layout import Layout
from mustdrop.pruners import InputPruner, VisionStagePruner
from mustdrop.runtime.attention_capture import implementation_of
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.runtime.vision.marks import FeatureMarks, merge_behind
from mustdrop.runtime.vision.media_plan import MediaPlan

if TYPE_CHECKING:
    from mustdrop.runtime.vision.encoder import EncoderStage
    from mustdrop.runtime.vision.packed import Decision


def check(pruner: InputPruner | None, adapter: Adapter, tower: Tower | None) -> None:
    """Raise `UnsupportedModelError` for an input stage, and an encoder that cannot run on some of the patches.

    Args:
        pruner: the input stage, or None.
        adapter: of the family.
        tower: its encoder; None if the adapter cannot look into that.
    """
    if pruner is None or (tower is not None and tower.cuts and adapter.cell_pixels):
        return
    why = adapter.lacks.get("vision", "") if tower is None else tower.uncut
    if tower is not None and not tower.packed and not tower.padded:
        why = "its encoder takes whole pictures, one beside the other, and not a sequence."
    nearest = '"fastv"' if "vision" in adapter.lacks else '"divprune"'
    raise UnsupportedModelError(
        f"the input stage cannot be used with the {adapter.name} family: "
        f"{why or 'which pixels a patch is made of is not known before its encoder.'} It needs packed patches with "
        "positions of their own (Qwen-VL, GLM-4V and their kin). Leave input= out, or use the nearest method that "
        f"works here: mustdrop.patch(model, {nearest}, keep=...)."
    )


def check_layers(pruner: VisionStagePruner, tower: Tower, last: int, read: Sequence[int]) -> int | None:
    """The layer after which what is not selected leaves the encoder, or None.

    Args:
        pruner: the vision stage.
        tower: the encoder.
        last: its layer that the features are read from.
        read: its layers that are read.

    Raises:
        UnsupportedModelError: patches cannot leave this encoder.
        ConfigError: there is no such layer, or something is read after it.
    """
    layer = pruner.select_layer
    if layer is None:
        return None
    depth = len(tower.blocks)
    if not tower.cuts:
        why = tower.uncut or "its encoder takes whole pictures, one beside the other."
        raise UnsupportedModelError(
            f"VisionStagePruner.select_layer={layer}: tokens cannot leave this encoder on the way: {why} Leave it out: "
            "then they leave after it."
        )
    if not -depth <= layer < depth:
        raise ConfigError(
            f"VisionStagePruner.select_layer={layer}: this encoder has layers 0 to {depth - 1} (or negative)."
        )
    found = layer % depth
    late = [index for index in read if index > found]
    if late:
        raise ConfigError(
            f"VisionStagePruner.select_layer={layer} selects after encoder layer {found}, and layer {max(late)} is "
            f"read for it: set key_layer={found} or an earlier one (of a rule, its layers), or select later."
        )
    if pruner.window is not None and pruner.layer >= found:
        raise ConfigError(
            f"VisionStagePruner.select_layer={layer} must come after the merging layer {pruner.layer}: it selects from "
            "what merging leaves."
        )
    return found


def incoming(
    pruner: InputPruner,
    pixels: Tensor,
    layouts: Sequence[Layout],
    owners: Sequence[int],
    ends: Mapping[int, int],
) -> list[Tensor]:
    """Per medium (N,) bool, features whose patches do not enter the encoder.

    Args:
        pruner: the input stage.
        pixels: (P, D) of each patch, in the encoder's order.
        layouts: one per medium.
        owners: the prompt that each medium belongs to.
        ends: medium -> its feature that ends a prompt, which must enter.
    """
    gone = [torch.zeros(layout.size, dtype=torch.bool, device=HOST) for layout in layouts]
    for row in dict.fromkeys(owners):
        mine = [i for i, owner in enumerate(owners) if owner == row and not bool(layouts[i].structural.all())]
        if not mine:
            continue
        media = [_cells(pixels, layouts[i]) for i in mine]
        for i, kept in zip(mine, pruner(media), strict=True):
            places = layouts[i].cells.clamp(min=0)
            gone[i] = ~kept.flatten().to(HOST)[places] & ~layouts[i].structural
    for i, end in ends.items():
        gone[i][end] = False
    return gone


def _cells(pixels: Tensor, layout: Layout) -> Tensor:
    """(frames, rows, columns, D) float32, the pixels of the cells of one medium."""
    frames, rows, columns = layout.grids[0]
    place = torch.zeros(math.prod(layout.grids[0]), layout.patches.shape[1], dtype=torch.long, device=HOST)
    real = ~layout.structural
    place[layout.cells[real]] = layout.patches[real].clamp(min=0)
    found = pixels[place.to(pixels.device)].float()
    return found.flatten(1).view(frames, rows, columns, -1)


@dataclass
class PackedSteps:
    """What one pass through a packed encoder is asked to do.

    Attributes:
        stage: of the encoder.
        run: the pass.
        plan: what is asked of each medium.
        decide: decides about features (F, C), as `marks.decide` does.
        decided: what was decided inside, or None.
    """

    stage: EncoderStage
    run: EncoderRun
    plan: MediaPlan
    decide: Callable[[Tensor], FeatureMarks]
    decided: FeatureMarks | None = None

    def prepare(self, cells: Tensor, pixel_rows: Tensor | None = None) -> None:
        """Set up what leaves; nothing if nothing does.

        Args:
            cells: (F, k) patches of each feature.
            pixel_rows: (P,) long, the row of pixels that each patch is made of; None: in the same order.
        """
        from mustdrop.runtime.vision.packed import Packed  # here: most encoders are not packed

        run, stage, gone = self.run, self.stage, self.plan.gone
        packed = Packed(cells)
        if stage.tower.padded:
            from mustdrop.runtime.vision.padded import Padded

            packed = Padded(cells, attention=implementation_of(stage.tower.blocks[0]))
        if gone is not None and bool(gone.any()):
            packed.add(0, lambda states: (packed.owner.masked_fill(gone, -1), None))
            lost = cells[gone]
            lost = lost[lost >= 0]
            packed.unmade = lost if pixel_rows is None else pixel_rows[lost]
        if stage.merges_packed:
            assert stage.pruner is not None
            run.merges_packed = True
            packed.add(stage.pruner.layer + 1, self._merge)
        if stage.leaves_at is not None:
            packed.add(stage.leaves_at + 1, self._select)
        run.packed = packed if packed.steps else None

    def _merge(self, states: Callable[[], Tensor]) -> Decision:
        assert self.stage.pruner is not None
        owner, gone = merge_behind(self.stage.pruner, self.plan, states()), self.plan.gone
        return owner if gone is None else owner.masked_fill(gone, -1), None

    def _select(self, states: Callable[[], Tensor]) -> Decision | None:
        packed, seen = self.run.packed, states()
        assert packed is not None
        decided = self.decide(seen.view(*packed.cells.shape, -1).mean(1))
        alive = torch.cat([mark.alive for mark in decided.marks])
        choice = decided.choice
        self.decided = replace(decided, choice=None)
        owner = torch.where(alive, torch.arange(len(alive), dtype=torch.long, device=HOST), -1)
        blends = choice is not None and any(chosen.blend is not None for _, chosen in choice.parts)
        return owner, choice.blend if choice is not None and blends else None
