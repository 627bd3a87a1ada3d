"""What a vision pruner calls to choose features: a small frozen object, defined in the file of its method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from mustdrop.errors import ConfigError
from mustdrop.pruners import answers
from mustdrop.pruners.base import Settings
from mustdrop.rules.geometry import Geometry, around_mean, distinctiveness
from mustdrop.rules.scores import min_max
from mustdrop.selection import Selection


class Read(Settings):
    """Something that is read from one encoder layer, a value or a vector per patch.

    Attributes:
        what: "attention": what the CLS token gives to a patch or, in an encoder without CLS, what a patch receives on
            average, mean over the heads. "received": what a patch receives on average, also where there is a CLS token.
            "joint_attention": as "attention", with the heads' queries and keys side by side as one long vector (of an
            encoder without CLS, as "attention"). "keys": key vector, mean over the heads. "joint_keys": the heads' keys
            side by side. "states": the hidden state that leaves the layer, before the model maps it on; a feature made
            of several patches has their mean.
        layer: encoder layer (0-based); negative counts from the end, -1 is the last one.
        of: the depth that `layer` is meant for, counted up to the layer that the features are read from: the layer is
            scaled to the encoder at hand, and (but for "states") to the nearest one whose patches see the whole frame
            (of two, the deeper one). None takes `layer` as it is.
    """

    what: Literal["attention", "received", "joint_attention", "keys", "joint_keys", "states"] = "attention"
    layer: int = -1
    of: int | None = None

    @model_validator(mode="after")
    def _inside(self) -> Read:
        if self.of is not None and not 0 <= self.layer < self.of:
            raise ConfigError(f"Read(layer={self.layer}, of={self.of}): expected a layer from 0 to {self.of - 1}.")
        return self

    def at(self, depth: int, last: int, whole: Sequence[int] = (), name: str = "Read.layer") -> int:
        """The layer in an encoder of `depth` layers whose features are read from layer `last`.

        Args:
            depth: of the encoder.
            last: the layer that its features are read from.
            whole: layers whose patches see the whole frame; empty if all do.
            name: what the error message calls `layer`.

        Raises:
            ConfigError: the encoder has no such layer.
        """
        if self.of is not None:
            scaled = last if self.of == 1 else round(self.layer * last / (self.of - 1))
            if self.what == "states":
                return scaled
            return min(whole, key=lambda layer: (abs(layer - scaled), -layer), default=scaled)
        if not -depth <= self.layer < depth:
            raise ConfigError(
                f"{name}={self.layer}: this encoder has layers 0 to {depth - 1} (or negative, from the end)."
            )
        return self.layer % depth


@dataclass(frozen=True)
class Features:
    """What a vision rule knows of B views with N features each, rows of no view mixed.

    Attributes:
        values: (B, N, C) float32, the features: what leaves the encoder, or what enters the language model.
        frame: (B, N) long, frame of a video, or grid of an image, that each feature lies in.
        row: (B, N) long, its row in the frame.
        column: (B, N) long, its column.
        read: what the rule asked for: (B, N) for attention, (B, N, D) for keys and states.
        question: per view (T, C), embeddings of the prompt's words after its last picture, if the rule asked for them.
        size: (B, N) float, how many features of the encoder each stands for; None: one, since nothing has merged.
        first: (B, N) long, first frame of the video that each feature lies in; each grid of an image is a video of one
            frame. None: all frames are of one video.
    """

    values: Tensor
    frame: Tensor
    row: Tensor
    column: Tensor
    read: Mapping[Read, Tensor] = field(default_factory=dict)
    question: tuple[Tensor, ...] = ()
    size: Tensor | None = None
    first: Tensor | None = None

    @classmethod
    def of_grid(
        cls, values: Tensor, grid: tuple[int, ...], read: Mapping[Read, Tensor], question: tuple[Tensor, ...] = ()
    ) -> Features:
        """Features (B, N, C) of whole grids (rows, columns) or (frames, rows, columns), in raster order."""
        frames, rows, columns = (1, *grid)[-3:]
        if frames * rows * columns != values.shape[1]:
            raise ConfigError(f"a grid of {grid} has {frames * rows * columns} cells, got {values.shape[1]} features.")
        cell = torch.arange(values.shape[1], dtype=torch.long, device=values.device).expand(len(values), -1)
        frame, row, column = cell // (rows * columns), cell // columns % rows, cell % columns
        return cls(values.float(), frame, row, column, read, question)

    def of(self, read: Read) -> Tensor:
        """What was read; a `ConfigError` that names it if nobody gave it."""
        if read not in self.read:
            raise ConfigError(
                f"this rule needs {read.what!r} of encoder layer {read.layer}: pass it as Features(read={{...}})."
            )
        return self.read[read].to(self.values.device)


class VisionRule(Settings):
    """Base of the rules of the vision stage: subclass, and write `choose`.

    Attributes:
        by_view: whether each view (a tile, a frame, an image that is seen whole) has its part of the budget and is
            chosen from alone; else all features of an image or video compete.
        space: which features the rule sees and blends: what leaves the "encoder", where a feature of the language model
            is one patch of it (else as the other), or what enters the "language" model.
        asks: whether the words of the question are read.
    """

    by_view: ClassVar[bool] = True
    space: ClassVar[Literal["encoder", "language"]] = "language"
    asks: ClassVar[bool] = False

    @model_validator(mode="after")
    def _known(self) -> VisionRule:
        """What is read is something that can be."""
        reads: object = self.reads
        if not isinstance(reads, tuple) or not all(isinstance(read, Read) for read in reads):
            raise ConfigError(f"{type(self).__name__}.reads: expected a tuple of Read(...), got {reads!r}.")
        if self.space not in ("encoder", "language"):
            raise ConfigError(f'{type(self).__name__}.space: expected "encoder" or "language", got {self.space!r}.')
        return self

    @property
    def reads(self) -> tuple[Read, ...]:
        """What is read from the encoder."""
        return ()

    def choose(self, seen: Features, count: int | None) -> Selection:
        """Choose `count` of the features of each view, 0 < count < N.

        Args:
            seen: what is known.
            count: how many stay; None (only with `VisionStagePruner(keep="rule")`, and one view at a time) lets the
                rule decide.
        """
        raise NotImplementedError

    def bound(self, model: torch.nn.Module) -> VisionRule:
        """The rule for one model: `patch` asks for it. Itself, unless something of it comes with the model."""
        return self

    def __call__(self, seen: Features, count: int | None = None) -> Selection:
        """`choose`, after a look at the numbers.

        Raises:
            ConfigError: there are not that many features, or the rule returns what is no choice of them.
        """
        n = seen.values.shape[1]
        if count is not None and not 0 < count <= n:
            raise ConfigError(f"{type(self).__name__}: expected 1 to {n} features to keep, got count={count}.")
        if count == n:
            return Selection(torch.arange(n, dtype=torch.long, device=seen.values.device).expand(len(seen.values), -1))
        return answers.features(self, seen, count)


class PictureRule(VisionRule):
    """Base of the rules that also change what the encoder sees: a picture of fewer pixels, as few tokens may stay."""

    def reduced(self, grid: tuple[int, int, int], count: int) -> tuple[int, int]:
        """Rows and columns of the smallest grid of about the same shape that has `count` features in all frames.

        Args:
            grid: (frames, rows, columns) of the medium's features.
            count: how many may stay.
        """
        frames, rows, columns = grid
        wanted = -(-count // frames)
        high = min(rows, max(1, round((wanted * rows / columns) ** 0.5), -(-wanted // columns)))
        return high, min(columns, -(-wanted // high))

    def blurred(self, pixels: Tensor, scale: float) -> Tensor:
        """Pixels (items, channels, rows, columns) made `scale` times as large along each side, and as large as before.

        Bilinear both ways, without aliases.
        """
        size = [max(1, round(side * scale)) for side in pixels.shape[-2:]]
        resize = torch.nn.functional.interpolate
        small = resize(pixels.float(), size, mode="bilinear", antialias=True)
        return resize(small, pixels.shape[-2:], mode="bilinear").to(pixels.dtype)


class InnerRule(VisionRule):
    """Base of the rules that also merge inside the layers of the encoder, between attention and MLP.

    That takes an encoder whose items have a batch dimension and no padding, whose layers can be halved (`Tower.halves`)
    and whose patches become one feature each. With another encoder `choose` alone has to do.

    Attributes:
        weighs: whether later layers weigh a merged token's attention with its size (by a bias on the logits).
        per_head: whether `join` gets the keys of each head, (B, H, N, D), in place of their mean.
    """

    weighs: bool = True
    per_head: ClassVar[bool] = False

    def amounts(self, patches: int, target: int, layers: int) -> list[int]:
        """Tokens that merge in each of the layers.

        Args:
            patches: of one item.
            target: patches that may be left; merging further is up to `choose`, behind.
            layers: encoder layers up to the one that features are read from.
        """
        raise NotImplementedError

    def join(self, keys: Tensor, number: int, protected: int) -> tuple[Tensor, int]:
        """(B, N) slot of each token when `number` tokens of one layer merge, and how many slots there are.

        Args:
            keys: (B, N, D) keys of the layer, mean over the heads; or those of each head, see `per_head`.
            number: tokens that go.
            protected: tokens at the front that stay what they are.
        """
        raise NotImplementedError

    def join_uneven(self, keys: Tensor, numbers: Tensor, lengths: Tensor, protected: int) -> Tensor | None:
        """`join` of rows that differ in what they have and in what goes, all at once.

        Args:
            keys: as for `join`.
            numbers: (B,) long, tokens that go in each row: that many must, or half of those not protected, if fewer.
            lengths: (B,) long, tokens of each row; what comes after them is padding.
            protected: as for `join`.

        Returns:
            (B, N) long, slot of each token, -1 on padding; None: `join` is asked for the rows of each kind.
        """
        return None


# -- rules that compare features with each other -----------------------------------------------------------------------

# Of the encoder's layer that features are read from: in LLaVA, layer 22 of the 23 that run.
LAST = {"layer": 22, "of": 23}
STATES = (Read(what="states", **LAST),)


class Comparing(Settings):
    """The knob of methods that compare features with each other. Source: Cen-Prune (arXiv 2608.30263).

    Attributes:
        geometry: "raw" compares features as they are; "centered" around their mean; "standardized" those of the
            encoder, around their mean and with channels of equal variance (for Qwen's encoders). Except for "raw",
            importance is multiplied with how distinct a feature is.
    """

    geometry: Geometry = "raw"


class ComparingRule(Comparing, VisionRule):
    """Base of the vision rules that compare features with each other: see `mustdrop.rules.geometry`."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """What else the rule reads, and what the encoder hands over where that is compared."""
        found = super().reads
        return tuple(dict.fromkeys((*found, *STATES))) if self.geometry == "standardized" else found

    def compared(self, seen: Features) -> Tensor:
        """(B, N, C): the rule's features, or for "standardized" the encoder's, of the patches of each in the mean."""
        return seen.of(STATES[0]) if self.geometry == "standardized" else seen.values

    def centred(self, seen: Features) -> Tensor:
        """(B, N, C): what is compared, around its mean; "raw": the features as they are."""
        return around_mean(self.compared(seen), self.geometry)

    def weighed(self, importance: Tensor, seen: Features) -> Tensor:
        """(B, N) importances; but for "raw", from 0 to 1 in each row, and times how distinct each feature is."""
        if self.geometry == "raw":
            return importance
        return min_max(importance.float()) * distinctiveness(self.compared(seen), self.geometry)
