"""`get_*_features` of a patched model: the vision stage's decisions, and their marks in the features."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from mustdrop.adapters.base import Modality
from mustdrop.compat import by_name, eager, first_parameter
from mustdrop.errors import MustDropError, UnsupportedOptionError
from mustdrop.layout import Layout
from mustdrop.pruners import Importance, PictureRule, VisionRule, VisionStagePruner, answers
from mustdrop.runtime import guards
from mustdrop.runtime.plan import (
    MediaShare,
    ending_features,
    limits_of_media,
    media_shares,
    rows_of_media,
    shown_features,
)
from mustdrop.runtime.state import Call, Local
from mustdrop.runtime.vision import fixed_counts, fixed_marks, packed_steps
from mustdrop.runtime.vision.block_merging import BlockMerging
from mustdrop.runtime.vision.encoder import EncoderStage
from mustdrop.runtime.vision.encoder_run import EncoderRun
from mustdrop.runtime.vision.feature_tables import patches_left, stacked
from mustdrop.runtime.vision.fixed_counts import FeatureCounts
from mustdrop.runtime.vision.marks import FeatureMarks, decide, must_remain
from mustdrop.runtime.vision.selection import PlacedSelections, VisionSelector, Weigher

if TYPE_CHECKING:
    from mustdrop.runtime.session import Runtime
    from mustdrop.runtime.vision.picture_sizes import SmallerPictures

T = TypeVar("T")

#: Decides where there is no vision stage: all that is there stays, and nothing is read.
_KEEPS_ALL = VisionStagePruner(window=None, key_share=0, score="uniform")


class MarksHook:
    """Leads marked features around a module that the model runs on what `get_*_features` gave.

    The module would keep rows of NaN as they are, but in training its weights would get them as gradients.
    """

    def __init__(self, local: Local) -> None:
        self.local = local

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Zeros in place of the marks."""
        self.local.dropped = args[0][..., :1].isnan()
        return args[0].masked_fill(self.local.dropped, 0.0), *args[1:]

    def after(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """The marks again."""
        dropped, self.local.dropped = self.local.dropped, None
        return out if dropped is None else out.masked_fill(dropped.to(out.device), torch.nan)


class FeaturesWrapper:
    """Stands in for a `get_*_features` of the base model: runs the stage and marks dropped rows with NaN."""

    def __init__(self, runtime: Runtime, modality: Modality, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.runtime, self.modality, self.function = runtime, modality, function

    @eager
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode as before, with NaN in the rows of dropped features."""
        output = self._encoded(args, kwargs)
        if self.runtime.local.coming is not None and self.runtime.local.encoder is None:
            self.runtime.stage.ahead()
        return output

    def _encoded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        runtime, kind = self.runtime, self.modality.name
        local, stage = runtime.local, runtime.encoders.get(kind)
        arguments = self._arguments(args, kwargs)
        if arguments is None or local.encoder is not None:  # inside: the method of one kind calls that of another
            return self.function(*args, **kwargs)
        for name in self.modality.pixels:
            guards.pixels(name, arguments.get(name), self.modality)
        layouts = runtime.adapter.layouts(runtime.model, kind, arguments)
        sizes = [layout.size for layout in layouts]
        call = runtime.calls.encoding
        mine = call.totals_of.get(kind, []) if call is not None else []
        owners = rows_of_media(sizes, mine)
        of_call = call is not None and owners is not None
        if owners is None:  # features of other media than the call's: each medium is a prompt of its own
            owners, mine = list(range(len(sizes))), sizes
        if call is not None:
            call.layouts[kind] = _grouped(layouts, owners, len(mine))
        if stage is None:
            return self.function(*args, **kwargs)
        if stage.merges:
            stage.check(runtime.adapter.read_layer(runtime.model, kind, arguments))
        shown = shown_features(call, kind, sizes) if call is not None and of_call else None
        gone = self._gone(layouts, owners, call if of_call else None, sizes, shown, arguments)
        shown = packed_steps.left(shown, gone)
        seen = sizes if shown is None else [int(own.sum()) for own in shown]
        if call is not None and of_call:
            plans, shares = call.plans, media_shares(call, kind)
        else:
            plans, shares = [runtime.plan(size) for size in sizes], [MediaShare((size,)) for size in sizes]
        ends = ending_features(shares, owners, sizes, shown)
        most = limits_of_media(seen, owners, shares, [plan.at_most for plan in plans])
        least = limits_of_media(seen, owners, shares, [plan.at_least for plan in plans])
        counted = not ends and shown is None  # nothing that only the data tell
        run = self._run(stage, layouts, least, arguments, counted)
        run.inside = self._inside(stage, layouts, most, arguments)
        run.gone = None if gone is None else torch.cat(gone)
        chooser = self._chooser(stage, run, layouts, most, ends, shown, call if of_call else None, owners)
        pruner = stage.pruner or _KEEPS_ALL
        weigh = self._weigher(pruner, run, layouts, call if of_call else None, owners)

        def decide_on(flat: Tensor, choice: PlacedSelections | None = None) -> FeatureMarks:
            return decide(pruner, run, layouts, flat, least, most, ends, shown, chooser, choice, weigh)

        steps = packed_steps.PackedSteps(stage, run, layouts, least, decide_on)
        if stage.shortens:
            place = None if run.gone is None else runtime.adapter.pixel_rows(runtime.model, kind, arguments)
            steps.prepare(torch.from_numpy(stacked(layouts)), place)
        counts = self._counts(stage, run, layouts, least, most, arguments) if counted else None
        if chooser is not None and counts is not None:
            chooser.fixed = functools.partial(_choose_fixed, counts)
        early = None
        if chooser is not None and chooser.rule.space == "encoder":
            from mustdrop.runtime.vision.early_selection import EarlySelection

            early = EarlySelection(chooser, stage.tower, runtime.adapter.read_layers(runtime.model, kind, arguments))
            run.leave = early
        shrunk = self._shrunk(stage, run, layouts, most, arguments)
        local.encoder = run
        try:
            output = (
                self.function(*args, **kwargs) if shrunk is None else shrunk(self.function, args, kwargs, arguments)
            )
        finally:
            local.encoder, local.capture = None, None
        if call is not None:
            call.encoded.append(run)
        if stage.pruner is None and gone is None:
            return output
        field = self.runtime.adapter.features
        flat = self._flat(getattr(output, field), layouts)
        choice = None if early is None else early.choice
        if call is not None and _structural(layouts) and _count(getattr(output, field)) < len(flat):
            call.unmarked = True  # rows that the model adds later bear no marks
        if counts is not None:
            decided = fixed_marks.decide(pruner, run, layouts, flat, least, counts, chooser, choice, weigh)
            if call is not None and decided.flat is not None:
                call.flat[kind] = decided.flat
        else:
            decided = steps.decided or decide_on(flat, choice)
        setattr(output, field, _restored(decided.write(flat), getattr(output, field), layouts))
        for name in self.runtime.adapter.added_features:
            levels = [_restored(decided.merged(_rows(level)), level, layouts) for level in getattr(output, name)]
            setattr(output, name, levels)
        if call is not None:
            call.marks[kind] = _grouped(decided.marks, owners, len(mine))
        return output

    def _gone(
        self,
        layouts: Sequence[Layout],
        owners: Sequence[int],
        call: Call | None,
        sizes: Sequence[int],
        shown: list[Tensor] | None,
        arguments: dict[str, Any],
    ) -> list[Tensor] | None:
        """Per medium (N,) bool, features whose patches the input stage does not let in; None without such a stage."""
        runtime, kind = self.runtime, self.modality.name
        pruner = runtime.method.input
        if pruner is None:
            return None
        pixels = runtime.adapter.pixels(runtime.model, kind, arguments)
        shares = [] if call is None else media_shares(call, kind)
        ends = dict[int, int]() if call is None else ending_features(shares, owners, sizes, shown)
        return packed_steps.incoming(pruner, pixels, layouts, owners, ends)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The call's arguments by name; None if there are no pixels, for transformers' own error message.

        Releases name the main argument differently; what comes first is what is encoded.
        """
        arguments = by_name(self.function, args, kwargs) if args else dict(kwargs)
        names = self.modality.pixels
        first = arguments.get(first_parameter(self.function))
        if all(arguments.get(name) is None for name in names) and isinstance(first, Tensor):
            arguments[names[0]] = first
        return arguments if any(arguments.get(name) is not None for name in names) else None

    def _counts(
        self,
        stage: EncoderStage,
        run: EncoderRun,
        layouts: Sequence[Layout],
        least: Sequence[int],
        most: Sequence[int],
        arguments: dict[str, Any],
    ) -> FeatureCounts | None:
        """Features of each medium, where nothing but shapes decides how many there are."""
        runtime, kind, pruner = self.runtime, self.modality.name, stage.pruner
        if pruner is None or pruner.keep == "rule" or pruner.compat == "released" or run.packed is not None:
            return None
        if pruner.rule is not None and not fixed_counts.choosable(pruner.rule, run, layouts, pruner):
            return None
        item = 0
        if run.inside is not None:
            item = math.prod(runtime.adapter.encoder_grid(runtime.model, kind, arguments))
        return fixed_counts.counts_of(pruner, run, layouts, least, most, item)

    def _run(
        self,
        stage: EncoderStage,
        layouts: Sequence[Layout],
        least: Sequence[int],
        arguments: dict[str, Any],
        counted: bool,
    ) -> EncoderRun:
        runtime, kind = self.runtime, self.modality.name
        run = EncoderRun(stage.tower)
        pool = runtime.adapter.pool(runtime.model, kind, arguments)
        grids = [grid for layout in layouts for grid in layout.grids]
        frames = max((grid[0] for grid in grids), default=1)
        if stage.pruner is None:
            return run
        if pool is None or not stage.merges_inside(pool, frames):
            for grid in grids if runtime.method.strict else ():
                stage.pruner.check(grid)
            return run
        run.grid, run.pool = runtime.adapter.encoder_grid(runtime.model, kind, arguments), pool
        if runtime.method.strict:
            stage.pruner.check(run.grid, pool)
        if counted and stage.pruner.counts_windows:
            run.windows = fixed_counts.windows_inside(stage.pruner, layouts, least, run)
        elif stage.pruner.selects and any(layout.size for layout in layouts):
            run.at_least = must_remain(stage.pruner, layouts, least, run)
        return run

    def _inside(
        self, stage: EncoderStage, layouts: Sequence[Layout], most: Sequence[int], arguments: dict[str, Any]
    ) -> BlockMerging | None:
        """Merging in the encoder's layers, where the rule does it and each patch is a feature."""
        runtime, kind, rule = self.runtime, self.modality.name, stage.inner
        if rule is None or runtime.adapter.pool(runtime.model, kind, arguments) != 1:
            return None
        rows, columns = runtime.adapter.encoder_grid(runtime.model, kind, arguments)
        targets = patches_left(layouts, most, rows * columns)
        # a call may read an earlier layer than the config says
        layers = min(stage.last, runtime.adapter.read_layer(runtime.model, kind, arguments)) + 1
        amounts = [answers.amounts(rule, rows * columns, target, layers) for target in targets]
        return BlockMerging.of(rule, amounts, stage.tower)

    def _chooser(
        self,
        stage: EncoderStage,
        run: EncoderRun,
        layouts: Sequence[Layout],
        most: Sequence[int],
        ends: Mapping[int, int],
        shown: Sequence[Tensor] | None,
        call: Call | None,
        owners: Sequence[int],
    ) -> VisionSelector | None:
        """What asks the pruner's rule, if it has one."""
        pruner = stage.pruner
        if pruner is None or pruner.rule is None:
            return None
        questions = self._questions(pruner.rule, call, owners)
        budget = None if pruner.keep == "rule" else most
        return VisionSelector(pruner.rule, run, layouts, budget, ends, shown, questions, pruner.compat == "released")

    def _questions(self, reader: VisionRule | Importance, call: Call | None, owners: Sequence[int]) -> list[Tensor]:
        """Per medium the words of its prompt; empty if they are not asked for."""
        if not reader.asks:
            return []
        if call is None or call.words is None:
            raise UnsupportedOptionError(
                f"{type(reader).__name__} reads the question, and this call of {self.modality.method} has none: call "
                "the model (or generate) with the prompt and the media together."
            )
        return [call.words[row] for row in owners]

    def _weigher(
        self,
        pruner: VisionStagePruner,
        run: EncoderRun,
        layouts: Sequence[Layout],
        call: Call | None,
        owners: Sequence[int],
    ) -> Weigher | None:
        """What says how important features are in place of the encoder's attention, if something does."""
        weighs = pruner.weighs
        if weighs is None:
            return None
        return Weigher(weighs, run, layouts, self._questions(weighs, call, owners))

    def _shrunk(
        self,
        stage: EncoderStage,
        run: EncoderRun,
        layouts: Sequence[Layout],
        most: Sequence[int],
        arguments: dict[str, Any],
    ) -> SmallerPictures | None:
        """Pictures of fewer pixels, if the rule wants them and some tokens leave."""
        rule = None if stage.pruner is None else stage.pruner.rule
        fewer = any(0 < n < layout.size for n, layout in zip(most, layouts, strict=True))
        if not isinstance(rule, PictureRule) or not fewer:
            return None
        from mustdrop.runtime.vision.picture_sizes import SmallerPictures

        runtime, kind = self.runtime, self.modality.name
        item = 0 if stage.tower.packed else math.prod(runtime.adapter.encoder_grid(runtime.model, kind, arguments))
        return SmallerPictures(rule, runtime.adapter, runtime.model, kind, layouts, most, item, run)

    def _flat(self, features: Any, layouts: Sequence[Layout]) -> Tensor:
        """(F, C) features of all media."""
        made = _rows(features)
        expected = sum(layout.size for layout in layouts)
        if len(made) == expected - _structural(layouts) < expected:  # some releases add these rows only afterwards
            picture = ~torch.cat([layout.structural for layout in layouts]).to(made.device)
            made = made.new_zeros(expected, made.shape[1]).masked_scatter(picture[:, None], made)
        if len(made) != expected:
            raise MustDropError(
                f"the adapter {self.runtime.adapter.name!r} expected {expected} features of {len(layouts)} "
                f"{self.modality.name}s ({[layout.size for layout in layouts]}), the model made {len(made)}. "
                "Do the processor and the config of the model agree (patch size, image size, merge size)?"
            )
        return made


def _choose_fixed(
    counts: FeatureCounts, chooser: VisionSelector, features: Tensor, owner: Tensor | None
) -> PlacedSelections:
    return fixed_marks.choose(chooser, features, None if chooser.run.merged is None else owner, counts)


def _grouped(values: Sequence[T], owners: Sequence[int], rows: int) -> list[list[T]]:
    """One list per prompt of what belongs to its media."""
    out: list[list[T]] = [[] for _ in range(rows)]
    for value, row in zip(values, owners, strict=True):
        out[row].append(value)
    return out


def _rows(features: Any) -> Tensor:
    """(F, C) of features in whatever container: one tensor, or one per medium, with or without a frame dimension."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    parts = [part.flatten(0, -2) for part in features]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _structural(layouts: Sequence[Layout]) -> int:
    """Rows of all media that stand for no part of a picture."""
    return sum(layout.size - layout.in_picture for layout in layouts)


def _count(features: Any) -> int:
    """F of features in whatever container."""
    parts = [features] if isinstance(features, Tensor) else features
    return sum(math.prod(part.shape[:-1]) for part in parts)


def _restored(flat: Tensor, like: Any, layouts: Sequence[Layout]) -> Any:
    """Features (F, C) in the container that the model returned them in, without rows that it adds only later."""
    parts = [like] if isinstance(like, Tensor) else list(like)
    counts = [math.prod(part.shape[:-1]) for part in parts]
    if sum(counts) < len(flat):
        flat = flat[~torch.cat([layout.structural for layout in layouts]).to(flat.device)]
    if isinstance(like, Tensor):
        return flat.view(like.shape)
    pieces = torch.split(flat, counts)
    return type(like)(piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True))
