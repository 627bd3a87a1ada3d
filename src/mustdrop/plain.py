"""The vision stage on plain tensors, for engines that run the model themselves.

An engine hands over what its encoder computed (queries and keys of the layers in `reads`, the features) and how the
features lie; it gets back which of them stay, and their values. Nothing here hooks, patches or knows a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mustdrop.adapters.base import Tower
from mustdrop.errors import ConfigError
from mustdrop.layout import Layout
from mustdrop.pruners import Read, VisionStagePruner
from mustdrop.runtime.vision import attention
from mustdrop.runtime.vision.encoder import layers_read
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.runtime.vision.marks import FeatureMarks, decide
from mustdrop.runtime.vision.media_plan import MediaPlan
from mustdrop.runtime.vision.selection import PlacedSelections, VisionSelector, Weigher


@dataclass(frozen=True)
class Kept:
    """What stays of one image or video.

    Attributes:
        index: (k,) long, the features that stay, ascending.
        rows: (k, C) their values: their own, or those of what merged into them.
    """

    index: Tensor
    rows: Tensor


@dataclass(frozen=True)
class PlainStage:
    """A `VisionStagePruner` for an encoder that somebody else runs.

    Windows merge after the encoder, on the grid of features: nothing is taken out of a running encoder.

    Attributes:
        pruner: what is done. Its `keep` is not looked at: every call says how many features stay.
        tower: the encoder; `module` and `blocks` may be of any library.
        last: encoder layer that the features are read from.
    """

    pruner: VisionStagePruner
    tower: Tower
    last: int

    def __post_init__(self) -> None:
        for reader in (self.pruner.rule, self.pruner.weighs):
            if reader is not None and reader.asks:
                name = type(reader).__name__
                raise ConfigError(f"{name} reads the question, which is not known where only images are.")

    @cached_property
    def reads(self) -> dict[int, list[Read]]:
        """Encoder layer -> what is read from its queries and keys."""
        return layers_read(self.pruner, len(self.tower.blocks), self.last, self.tower.whole)

    @property
    def early(self) -> bool:
        """Whether the rule works on what leaves the encoder, before it is projected."""
        return self.pruner.rule is not None and self.pruner.rule.space == "encoder"

    def start(self, item: int = 0) -> EncoderRun:
        """State of one pass of media through the encoder.

        Args:
            item: patches of one item of a tower whose items have a batch dimension.
        """
        return EncoderRun(self.tower, item=0 if self.tower.packed else item)

    def read(self, run: EncoderRun, layer: int, q: Tensor, k: Tensor, scaling: float, borders: Tensor | None) -> None:
        """Read what is wanted of one encoder layer.

        Args:
            run: the pass.
            layer: number of the layer.
            q: (items, H, S, D) queries of all heads.
            k: (items, H, S, D) keys of all heads.
            scaling: of the logits.
            borders: for a packed sequence, where its segments begin, and its length.
        """
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        for read in self.reads.get(layer, ()):
            pieces = run.readings.setdefault(read, [])
            if self.tower.packed:
                pieces += attention.of_segments(read, q, k, None, {"cu_seq_lens_q": borders}, scaling)
            else:
                visible = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool, device=q.device)
                pieces.append(attention.of_items(read, self.tower, q, k, visible, scaling))

    def choose_early(
        self, run: EncoderRun, layouts: Sequence[Layout], features: Tensor, counts: Sequence[int]
    ) -> PlacedSelections:
        """What a rule for the encoder's own features decides; `PlacedSelections.blend` gives what is projected.

        Args:
            run: the pass.
            layouts: one per medium.
            features: (F, C) of all media, before they are projected.
            counts: features of each medium that stay.
        """
        chooser = self._chooser(run, MediaPlan(layouts, counts, counts))
        assert chooser is not None
        return chooser(features)

    def choose(
        self,
        run: EncoderRun,
        layouts: Sequence[Layout],
        features: Tensor,
        counts: Sequence[int],
        choice: PlacedSelections | None = None,
        rows: Tensor | None = None,
    ) -> list[Kept]:
        """Which features of each medium stay, and their values.

        Args:
            run: the pass.
            layouts: one per medium.
            features: (F, C) of all media, as they enter the language model.
            counts: features of each medium that stay.
            choice: what `choose_early` decided, if its values are written already.
            rows: (F, D) what is handed on, if that is more than the features (DeepStack); merged like them.
        """
        most = [min(count, layout.size) for count, layout in zip(counts, layouts, strict=True)]
        plan, weighs = MediaPlan(layouts, most, most), self.pruner.weighs
        weigh = None if weighs is None else Weigher(weighs, run, plan)
        decided = decide(self.pruner, run, plan, features, self._chooser(run, plan), choice, weigh)
        values = decided.write(features if rows is None else rows)
        return _kept(decided, values, [layout.size for layout in layouts])

    def _chooser(self, run: EncoderRun, plan: MediaPlan) -> VisionSelector | None:
        return None if self.pruner.rule is None else VisionSelector(self.pruner.rule, run, plan)


def _kept(decided: FeatureMarks, values: Tensor, sizes: Sequence[int]) -> list[Kept]:
    """The rows that are alive, per medium."""
    found = []
    for mark, own in zip(decided.marks, torch.split(values, list(sizes)), strict=True):
        index = mark.alive.nonzero()[:, 0].to(own.device)
        found.append(Kept(index, own[index]))
    return found
