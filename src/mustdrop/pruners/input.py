"""Input stage: what need not be encoded does not enter the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from mustdrop.pruners import answers
from mustdrop.pruners.base import Settings


class InputRule(Settings):
    """Base of the rules of the input stage: subclass, and write `choose`."""

    def choose(self, media: Sequence[Tensor]) -> list[Tensor]:
        """Choose from the pixels of a prompt.

        Args:
            media: its pictures and videos in their order, (frames, rows, columns, D) float32 each: the pixels of the
                cell of patches that one vision token is made of, as the processor normalised them.

        Returns:
            Per medium (frames, rows, columns) bool, cells that enter the encoder; at least one of each medium.
        """
        raise NotImplementedError

    def __call__(self, media: Sequence[Tensor]) -> list[Tensor]:
        """`choose`, after a look at what it returns.

        Raises:
            ConfigError: that is no choice of the cells.
        """
        return answers.cells(self, media)


class Predictable(InputRule):
    """Cells that repeat what is beside or above them, or the same place of what came before, need not be seen.

    Source: PixelPrune (arXiv 2604.00886). Made for documents, slides and screenshots. A photograph has no such cells.

    Attributes:
        tolerance: how much similar cells may differ, in the unit of the model's pixels: after the processor has
            normalised them, one of 256 steps of brightness is 1 / (255 * image_std), such as 0.0078 for image_std=0.5.
            0: not at all.
        metric: "max" (no value differs by more), "mae" (mean absolute difference) or "rmse".
        previous: whether a cell that repeats the same place of the previous frame, or of the picture just before it in
            the same prompt, if that is as large, need not be seen either.
    """

    tolerance: float = Field(0.0, ge=0)
    metric: Literal["max", "mae", "rmse"] = "max"
    previous: bool = True

    def choose(self, media: Sequence[Tensor]) -> list[Tensor]:
        """See `mustdrop.rules.prediction.unpredicted`."""
        from mustdrop.rules.prediction import unpredicted_media  # of this rule alone

        return unpredicted_media(media, self.tolerance, self.metric, self.previous)


class InputPruner(Settings):
    """Cells of a picture that need not be encoded do not enter the encoder; the rest keep their positions.

    It has no budget: the picture decides. Budgets of the stages after it count the tokens of the whole picture.

    Attributes:
        rule: which cells enter.

    Raises:
        ConfigError, UnknownKnobError: on construction, see the message.
    """

    rule: InputRule = Predictable()

    def __call__(self, media: Sequence[Tensor]) -> list[Tensor]:
        """Cells that enter the encoder: see `InputRule.choose`."""
        return self.rule(media)
