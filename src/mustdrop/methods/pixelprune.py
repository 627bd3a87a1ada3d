"""PixelPrune: predictable patches are not encoded (arXiv 2604.00886). Input stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mustdrop.method import Method, Recipe
from mustdrop.pruners import InputPruner, Predictable


class PixelPrune(Recipe):
    """Let only those cells into the encoder that the cells before them do not predict.

    For documents, slides and screenshots, and for families whose encoder takes packed patches (Qwen-VL, GLM-4V and
    their kin). There is no budget: the picture decides, and a photograph loses nothing.

    Attributes:
        tolerance: how much similar cells may differ, in the unit of the normalised pixels; 0: not at all.
        metric: how the difference is measured: "max", "mae" or "rmse".
        previous: whether a cell may also repeat the same place of the previous frame, or of the picture just before it
            in the same prompt, if that is as large. False looks at each frame alone, as the authors' code does.
    """

    tolerance: float = Field(0.0, ge=0)
    metric: Literal["max", "mae", "rmse"] = "max"
    previous: bool = True

    def build(self) -> Method:
        """Only the input socket is filled."""
        rule = Predictable(tolerance=self.tolerance, metric=self.metric, previous=self.previous)
        return Method(input=InputPruner(rule=rule))
