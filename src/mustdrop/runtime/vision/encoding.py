"""One pass of media through an encoder: what the vision stage asks of it, and what becomes of the features."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mustdrop.adapters.base import Modality
from mustdrop.errors import UnsupportedOptionError
from mustdrop.pruners import Importance, InputPruner, PictureRule, VisionRule, VisionStagePruner, answers
from mustdrop.runtime.vision import fixed_counts, fixed_marks, packed_steps
from mustdrop.runtime.vision.encoder import EncoderStage
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.runtime.vision.feature_tables import patches_left, stacked
from mustdrop.runtime.vision.fixed_counts import FeatureCounts
from mustdrop.runtime.vision.marks import FeatureMarks, decide, must_remain
from mustdrop.runtime.vision.media_plan import EncodedMedia
from mustdrop.runtime.vision.selection import PlacedSelections, VisionSelector, Weigher

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime
    from mustdrop.runtime.vision.block_merging import BlockMerging
    from mustdrop.runtime.vision.early_selection import EarlySelection
    from mustdrop.runtime.vision.picture_sizes import SmallerPictures

R = TypeVar("R", VisionRule, Importance)

#: Decides where there is no vision stage: all that is there stays, and nothing is read.
_KEEPS_ALL = VisionStagePruner(window=None, key_share=0, score="uniform")


class Encoding:
    """What one call of `get_*_features` asks of the encoder, made ready before that runs.

    Attributes:
        media: what is encoded, and whose it is.
        arguments: of `get_*_features`, by name.
        plan: what is asked of each medium.
        run: what the hooks of the encoder read and write.
        pruner: the vision stage.
        counts: features of each medium, where nothing but shapes decides how many there are; else None.
        chooser: asks the pruner's rule, if it has one.
        early: asks it as the features leave the encoder, if it works on those.
        weigh: says how important features are in place of the encoder's attention, if something does.
        steps: what leaves a packed encoder on the way.
        smaller: shows the encoder pictures of fewer pixels, if the rule wants them and some tokens leave.
    """

    def __init__(
        self, runtime: Runtime, modality: Modality, stage: EncoderStage, media: EncodedMedia, arguments: dict[str, Any]
    ) -> None:
        """Make ready.

        Args:
            runtime: of the model.
            modality: what is encoded.
            stage: of the encoder.
            media: what is encoded, and whose it is.
            arguments: of `get_*_features`, by name.

        Raises:
            ConfigError: merging would come after the layer that the features are read from.
            UnsupportedOptionError: the rule reads the question, and the call has none.
        """
        self._adapter, self._model, self._modality = runtime.adapter, runtime.model, modality
        self.media, self.arguments = media, arguments
        self._stage, self._strict = stage, runtime.method.strict
        if stage.merges:
            stage.check(self._adapter.read_layer(self._model, modality.name, arguments))
        gone = self._gone(runtime.method.input)
        self.plan = plan = media.plan(runtime.plan, gone)
        self.pruner = stage.pruner or _KEEPS_ALL
        self.run = self._run()
        self.run.inside = self._inside()
        self.chooser = self._chooser()
        weighs = self.pruner.weighs
        self.weigh = None if weighs is None else Weigher(self._answered(weighs), self.run, plan)
        self._decide = functools.partial(decide, self.pruner, self.run, plan, chooser=self.chooser, weigh=self.weigh)
        self.steps = packed_steps.PackedSteps(stage, self.run, plan, self._decide)
        if stage.shortens:
            rows = None if gone is None else self._adapter.pixel_rows(self._model, modality.name, arguments)
            self.steps.prepare(torch.from_numpy(stacked(plan.layouts)), rows)
        self.counts = self._counts() if plan.by_shapes else None
        if self.chooser is not None and self.counts is not None:
            self.chooser.fixed = functools.partial(_choose_fixed, self.counts)
        self.early = self._early()
        self.run.leave = self.early
        self.smaller = self._smaller()

    @property
    def marks(self) -> bool:
        """Whether features may be dropped or merged."""
        return self._stage.pruner is not None or self.plan.gone is not None

    def decide(self, features: Tensor) -> FeatureMarks:
        """What becomes of features (F, C) of all media, which the encoder has made."""
        choice = None if self.early is None else self.early.choice
        if self.counts is not None:
            return fixed_marks.decide(
                self.pruner, self.run, self.plan, features, self.counts, self.chooser, choice, self.weigh
            )
        return self.steps.decided or self._decide(features, choice=choice)

    def _gone(self, pruner: InputPruner | None) -> list[Tensor] | None:
        """Per medium (N,) bool, features whose patches the input stage does not let in; None without such a stage."""
        if pruner is None:
            return None
        media, pixels = self.media, self._adapter.pixels(self._model, self._modality.name, self.arguments)
        return packed_steps.incoming(pruner, pixels, media.layouts, media.owners, media.ends(media.shown))

    def _grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches of one item of the encoder's batch."""
        return self._adapter.encoder_grid(self._model, self._modality.name, self.arguments)

    def _run(self) -> EncoderRun:
        stage, plan = self._stage, self.plan
        run = EncoderRun(stage.tower)
        pool = self._adapter.pool(self._model, self._modality.name, self.arguments)
        grids = [grid for layout in plan.layouts for grid in layout.grids]
        frames = max((grid[0] for grid in grids), default=1)
        if stage.pruner is None:
            return run
        if pool is None or not stage.merges_inside(pool, frames):
            for grid in grids if self._strict else ():
                stage.pruner.check(grid)
            return run
        run.grid, run.pool = self._grid(), pool
        if self._strict:
            stage.pruner.check(run.grid, pool)
        if plan.by_shapes and stage.pruner.counts_windows:
            run.windows = fixed_counts.windows_inside(stage.pruner, plan, run)
        elif stage.pruner.selects and any(layout.size for layout in plan.layouts):
            run.at_least = must_remain(stage.pruner, plan, run)
        return run

    def _inside(self) -> BlockMerging | None:
        """Merging in the encoder's layers, where the rule does it and each patch is a feature."""
        stage, kind, rule = self._stage, self._modality.name, self._stage.inner
        if rule is None or self._adapter.pool(self._model, kind, self.arguments) != 1:
            return None
        from mustdrop.runtime.vision.block_merging import BlockMerging

        patches = math.prod(self._grid())
        targets = patches_left(self.plan.layouts, self.plan.most, patches)
        # a call may read an earlier layer than the config says
        layers = min(stage.last, self._adapter.read_layer(self._model, kind, self.arguments)) + 1
        return BlockMerging.of(rule, [answers.amounts(rule, patches, n, layers) for n in targets], stage.tower)

    def _chooser(self) -> VisionSelector | None:
        pruner = self.pruner
        if pruner.rule is None:
            return None
        rule = self._answered(pruner.rule)
        return VisionSelector(rule, self.run, self.plan, pruner.keep != "rule", pruner.compat == "released")

    def _answered(self, reader: R) -> R:
        """The same, whose question is known if it reads one."""
        if reader.asks and self.plan.words is None:
            raise UnsupportedOptionError(
                f"{type(reader).__name__} reads the question, and this call of {self._modality.method} has none: call "
                "the model (or generate) with the prompt and the media together."
            )
        return reader

    def _counts(self) -> FeatureCounts | None:
        pruner, run = self._stage.pruner, self.run
        if pruner is None or pruner.keep == "rule" or pruner.compat == "released" or run.packed is not None:
            return None
        if pruner.rule is not None and not fixed_counts.choosable(pruner.rule, run, self.plan.layouts, pruner):
            return None
        return fixed_counts.counts_of(pruner, run, self.plan, 0 if run.inside is None else math.prod(self._grid()))

    def _early(self) -> EarlySelection | None:
        chooser, kind = self.chooser, self._modality.name
        if chooser is None or chooser.rule.space != "encoder":
            return None
        from mustdrop.runtime.vision.early_selection import EarlySelection

        layers = self._adapter.read_layers(self._model, kind, self.arguments)
        return EarlySelection(chooser, self._stage.tower, layers)

    def _smaller(self) -> SmallerPictures | None:
        rule, plan = self.pruner.rule, self.plan
        fewer = any(0 < n < layout.size for n, layout in zip(plan.most, plan.layouts, strict=True))
        if not isinstance(rule, PictureRule) or not fewer:
            return None
        from mustdrop.runtime.vision.picture_sizes import SmallerPictures

        item = 0 if self._stage.tower.packed else math.prod(self._grid())
        return SmallerPictures(rule, self._adapter, self._model, self._modality.name, plan, item, self.run)


def _choose_fixed(
    counts: FeatureCounts, chooser: VisionSelector, features: Tensor, owner: Tensor | None
) -> PlacedSelections:
    return fixed_marks.choose(chooser, features, None if chooser.run.merged is None else owner, counts)
